"""The data-conflict study: mixtures x adapters x seeds, run, tested and reported."""
