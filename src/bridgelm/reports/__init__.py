"""The report about runs: figures, tables, text, the HTML page, and the file to share."""
