"""From raw logs to a prepared data set, out of core: load -> k-core -> phases -> windows -> part files."""
