"""From networks and labels or texts to images."""
