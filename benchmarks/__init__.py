"""What blobspace promises about speed, measured: ``python -m benchmarks`` from the repository's root."""
