"""The gateway's routes, a file per subject: `ROUTES` are served, `DESCRIBED` replace them in the OpenAPI document."""
