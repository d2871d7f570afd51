# `make` alone lists what there is. Everything runs in .venv, which `make setup` makes and re-uses.
SHELL := /bin/bash
BIN := .venv/bin
FAST := not vllm and not train and not clients and not drill
.DEFAULT_GOAL := help
.PHONY: help setup demo example-sql example-search example-calculator example-live experiments example-model test test-fast conformance lint types bench bench-storage bench-training docs clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install everything into .venv (CPU torch, vLLM, verl); a second run re-uses it
	@scripts/setup.sh

demo: setup ## The whole loop on this machine: an agent that learns through the proxy
	@$(BIN)/lightning-proxy demo $(ARGS)

example-sql: setup ## Three roles in LangGraph learn text-to-SQL, two of them trained
	@$(BIN)/python -m examples.experiment sql $(ARGS)

example-search: setup ## An agent of the OpenAI Agents SDK learns to search for answers
	@$(BIN)/python -m examples.experiment search $(ARGS)

example-calculator: setup ## An AutoGen agent learns to calculate
	@$(BIN)/python -m examples.experiment calculator $(ARGS)

example-live: setup ## An agent in service learns from its users' late thumbs
	@$(BIN)/python -m examples.live.run $(ARGS)

experiments: setup ## All of these, all seeds and controls: what docs/experiments.md shows (up to two hours)
	@$(BIN)/python -m examples.collect $(ARGS)
	@$(BIN)/python -m examples.report

example-model: setup ## Build the experiments' model from nothing, into lightning-examples/model
	@$(BIN)/python -m examples.model.build lightning-examples/model

test: setup lint types ## Lint, types and all tests, real vLLM and verl among them
	@$(BIN)/pytest -n 2 -m "$(FAST)" $(ARGS) || [ $$? = 5 ] # 5: ARGS names none of these
	@$(BIN)/pytest -m "not ($(FAST))" $(ARGS) || [ $$? = 5 ]

test-fast: setup lint types ## The same without vLLM, verl, foreign agents and drills, for daily work
	@$(BIN)/pytest -n 2 -m "$(FAST)" $(ARGS)

conformance: setup ## Real agents of many frameworks through the proxy; writes docs/conformance.md
	@$(BIN)/python -m conformance $(ARGS)

lint: setup ## ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup ## mypy, strict
	@$(BIN)/mypy

bench: setup ## CPU time per captured call, beside nginx and a bare forwarder
	@$(BIN)/python -m benchmarks.run $(ARGS)

bench-training: setup ## Where the seconds of a training run go
	@$(BIN)/python -m benchmarks.training $(ARGS)

bench-storage: setup ## The room that a long conversation takes in the database
	@$(BIN)/python -m benchmarks.storage $(ARGS)

docs: setup ## Write docs/settings.md from the code, and the pages of results
	@$(BIN)/python -m lightning_proxy.config.template > docs/settings.md
	@$(BIN)/python -m conformance.report > docs/conformance.md
	@$(BIN)/python -m examples.report

clean: ## Remove .venv, caches and what demo and tests left behind
	rm -rf .venv .conformance build dist lightning-demo lightning-examples lightning-runs examples/.venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
