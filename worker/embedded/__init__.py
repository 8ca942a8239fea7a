"""Embedded mode, `tombola up`: everything on one machine, without an installed server."""
