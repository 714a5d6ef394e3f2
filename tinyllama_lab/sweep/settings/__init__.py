"""From typed settings to the configurations of trials."""
