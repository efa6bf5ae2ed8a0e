"""From documents to batches: batch = f(seed, mixture, row cursor), the same on any number of hosts.

Start at `mlt.data.loader`: DataConfig, load_corpus, open_loader, validation_batches.
"""
