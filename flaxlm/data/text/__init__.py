"""Documents in: files, tables and data sets become a stream of texts."""
