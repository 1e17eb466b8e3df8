"""Whether two mathematical answers are equal. Imports no torch and nothing else of a training run."""
