"""One page about several runs: what is read of them, tables, pictures, samples."""
