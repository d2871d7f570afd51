"""Tests against real vLLM, started by ``lightning-proxy serve --model`` on the demo's tiny model."""
