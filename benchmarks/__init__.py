"""One file per published table; each ends with one JSON line, kept in `results/`."""
