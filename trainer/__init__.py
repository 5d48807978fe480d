"""Builds engine bundles offline, from good images. Needs the extra [train]."""
