"""What every method promises about an update and a run, checked: ours by tests/contract, one's own by
`python -m bridgelm.testing`."""
