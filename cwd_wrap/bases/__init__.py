"""What is known of the optimizers that are wrapped, and what is measured of the others."""
