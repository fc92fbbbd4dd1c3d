"""Turns files, tables and data sets into a stream of documents."""
