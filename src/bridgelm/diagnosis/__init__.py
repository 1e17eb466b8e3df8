"""What SFT and RL did to each other in a run."""
