"""The token store: built once, checksummed, read at random."""
