PYTHON := .venv/bin/python

.PHONY: help install demo demo-check demo-shell demo-status demo-stop endings lab lab-status lab-stop test lint bench docs screenshots

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install:  ## install Debian, Python and Node.js packages (quick when all is there)
	@bash scripts/install.sh

demo: install  ## the portal on this machine with sample data; prints address and accounts
	@$(PYTHON) -m tests.lab demo up

demo-check: install  ## bring the demo up, drive it with a browser, stop; prints one JSON object
	@$(PYTHON) -m tests.lab demo check

demo-shell: install  ## a shell at the demo's store, for the commands of operators and data managers
	@$(PYTHON) -m tests.lab demo shell

demo-status: install  ## is the demo running
	@$(PYTHON) -m tests.lab demo status

demo-stop: install  ## stop the demo
	@$(PYTHON) -m tests.lab demo down

lab: install  ## the lab: store, login server, identity provider, gateway, Slurm site
	@$(PYTHON) -m tests.lab lab up

lab-status: install  ## is the lab running
	@$(PYTHON) -m tests.lab lab status

lab-stop: install  ## stop the lab
	@$(PYTHON) -m tests.lab lab down

endings: install  ## the canary through every way that a session can end; prints a table
	@$(PYTHON) -m tests.lab.endings

test: install  ## all tests
	@$(PYTHON) -m tests.run

lint: install  ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench:  ## all benchmarks; renders docs/benchmarks.md
	@bash scripts/install.sh bench
	@$(PYTHON) -m bench

docs: install  ## check the documentation's links and commands
	@$(PYTHON) -m pytest -q tests/test_docs.py

screenshots: install  ## take the pictures of docs/ anew, on the lab
	@$(PYTHON) -m tests.lab.screenshots
