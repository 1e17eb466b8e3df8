"""Problems and demonstrations: reading, splitting and drawing them, and turning text into token ids."""
