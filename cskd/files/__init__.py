"""Where files may be put: paths of this machine, folders that know their kind, one writer at a time. No torch in here."""
