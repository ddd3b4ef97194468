"""The page in which people label a batch: a local web server, and its state on disk."""
