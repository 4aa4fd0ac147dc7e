"""What every command shares: settings, run directories, models, outcomes."""
