"""The configuration of a run: TOML to RunConfig, the options of each method, variants, and what `show` says of them."""
