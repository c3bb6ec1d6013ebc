"""The benchmark as a service: servers, workers, deployments. Every command may be repeated."""
