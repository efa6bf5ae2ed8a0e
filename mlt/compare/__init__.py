"""`mlt compare`: several runs on the same data, trained or read, in one table."""
