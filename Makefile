# Everything that is done in a clone, or with one. Needs a Python of 3.10 or newer, GNU make, and nothing else.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

VERSIONS := 3.14 3.13 3.12 3.11 3.10
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
ROOT := $(filter 0,$(shell id -u))
CODE := agent daemon examples packaging tests

# -- finding a Python -----------------------------------------------------------------------------

# Prints the first of the given commands that is a Python Reaper runs on and that can make a virtual environment.
# Debian's python3 has the module venv and cannot use it before python3-venv is there, which is what ensurepip tells.
# A pyenv shim exists for versions that are not switched on: only running it tells.
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
first_python = for python in $(1); do "$$python" -c '$(SUITABLE)' 2>/dev/null && { echo "$$python"; break; }; done
pythons = python$(1) $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python$(1))

# The python3 one has switched on, else the newest that is found; PYTHON=/path/to/python chooses another.
PYTHON ?= $(eval PYTHON := $(shell $(call first_python,python3 $(foreach v,$(VERSIONS),$(call pythons,$v)))))$(PYTHON)
NO_PYTHON = no Python of 3.10 or newer with the modules venv and ensurepip was found; install one \
(Debian and Ubuntu: python3 and python3-venv), or name one: make PYTHON=/path/to/python3
need = @[ -n '$($(1))' ] && $($(1)) -c '$(SUITABLE)' 2>/dev/null || { echo '$(NO_PYTHON)' >&2; exit 2; }

# -- in the clone ---------------------------------------------------------------------------------

.PHONY: help
help: ## list what make can do here
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

# An environment belongs to the place it was made in: scripts and the editable install name that path.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml
	$(call need,PYTHON)
	@echo 'preparing $(VENV) (once, and after a change of pyproject.toml)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@echo '$(CURDIR)' >$@

.PHONY: demo
demo: $(STAMP) ## kill a real grid search with SIGKILL, and watch Reaper clean up after it (15 s)
	@$(BIN)/python examples/demo.py

.PHONY: example
example: $(STAMP) ## train the risk models of examples/risk_model.py; end it whenever you like, and run it again
	@$(BIN)/python examples/risk_model.py --model-dir build/risk

# On paths of its own, so that it meets neither an installed daemon nor its state. Root's daemon is in system mode
# here too: the mode follows the user, not the paths.
RUN ?= $(CURDIR)/build/run
CONFIG ?= config/reaper.toml

.PHONY: run
run: $(STAMP) ## run the daemon here, in the foreground, beside any that is installed; CONFIG=my.toml, RUN=/tmp/folder
	@[ $$(printf %s '$(RUN)/reaper.sock' | wc -c) -le 100 ] || { \
	    echo 'a socket path may have 107 characters: make run RUN=/tmp/reaper-run' >&2; exit 2; }
	@mkdir -p '$(RUN)' && chmod 0700 '$(RUN)'
	@echo "to use it from another terminal:  export REAPER_SOCKET='$(RUN)/reaper.sock'"
	@exec $(BIN)/python -m reaperd --config '$(CONFIG)' --socket '$(RUN)/reaper.sock' --state-dir '$(RUN)/state'

# -- tests ----------------------------------------------------------------------------------------

# A /dev/shm of its own, where that may be had: pools come and go in there, which tests of others' leftovers would see.
MAY_UNSHARE = $(if $(ROOT),$(shell unshare --mount sh -c 'mount -t tmpfs tmpfs /dev/shm' 2>/dev/null && echo yes))
APART = $(if $(MAY_UNSHARE),unshare --mount sh -c 'mount -t tmpfs tmpfs /dev/shm && exec "$$0" "$$@"')

# On two cores in half the time, and a busy machine is what Reaper is for: two lanes of about the same length.
.PHONY: test
test: $(STAMP) ## lint, and every test: unit, system, siege, training, and as root those that need root
	@$(MAKE) --no-print-directory -j $(if $(MAY_UNSHARE),2,1) system apart lint

.PHONY: check
check: system apart ## every test, without lint; PYTEST_ARGS="-k name" chooses

.PHONY: system
system: $(STAMP)
	$(BIN)/python -m pytest tests/system $(PYTEST_ARGS) || [ $$? -eq 5 ]

# Training goes into a process of its own: with scikit-learn in it, one is too large for tests that look at themselves.
.PHONY: apart
apart: $(STAMP)
	$(APART) $(BIN)/python -m pytest tests/unit tests/siege $(if $(ROOT),tests/root) $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(APART) $(BIN)/python -m pytest tests/train tests/install $(PYTEST_ARGS) || [ $$? -eq 5 ]

.PHONY: lint
lint: $(STAMP) ## ruff and mypy
	$(BIN)/python -m ruff check $(CODE)
	$(BIN)/python -m ruff format --check $(CODE)
	$(BIN)/python -m mypy --strict
	$(BIN)/python -m mypy --strict examples tests/support/bootedsystem.py tests/support/installed.py tests/support/staged.py
	$(BIN)/python -m mypy --strict packaging/pages/generate.py packaging/pages/hatch_build.py

.PHONY: format
format: $(STAMP) ## put the code into the form that lint asks for
	$(BIN)/python -m ruff check --fix-only --exit-zero $(CODE)
	$(BIN)/python -m ruff format $(CODE)

.PHONY: matrix
matrix: ## every test on every Python from 3.10 to 3.14 that is found, each in a .venv-3.X
	@failed=; tested=; \
	$(foreach v,$(VERSIONS),python=$$($(call first_python,$(call pythons,$v))); \
	    if [ -z "$$python" ]; then echo '== Python $v was not found'; else \
	        echo "== Python $v: $$python"; \
	        $(MAKE) --no-print-directory check VENV=.venv-$v PYTHON="$$python" \
	            && tested="$$tested $v" || failed="$$failed $v"; fi; \
	) \
	echo "== passed on:$${tested:- none}$${failed:+; failed on:$$failed}"; [ -z "$$failed" ]

.PHONY: test-systemd
test-systemd: $(STAMP) ## the tests that boot a systemd, as root: the service, its sandbox, its journal, and an installation
	$(BIN)/python -m pytest tests/root tests/unit/test_packaging.py $(PYTEST_ARGS)

.PHONY: test-deb
test-deb: $(STAMP) ## build the Debian package and try it in booted systems, as root; make test does so where debhelper is
	@sh packaging/build-deb check
	$(APART) $(BIN)/python -m pytest tests/install/test_deb.py $(PYTEST_ARGS)

# In mounts of its own: the socket is at its usual place in there, and nothing of Podman's stays behind.
DOCKER = mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir /run/reaper /run/lock && exec "$$0" "$$@"

.PHONY: test-docker
test-docker: $(STAMP) ## build the image with Podman, as root, and have it reap trainings in and outside of containers
	$(if $(ROOT),unshare --mount --propagation private sh -c '$(DOCKER)') \
	    $(BIN)/python -m pytest tests/docker -v -rs $(PYTEST_ARGS)

# An environment of its own: some gigabytes.
# Environments of their own, for what is none of Reaper's dependencies: build/NAME has what tests/support/NAME.txt asks for.
build/%/.installed: tests/support/%.txt pyproject.toml | $(STAMP)
	@echo 'preparing $(@D) (once, and after a change of its requirements)'
	@$(BIN)/python -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]' -r $<
	@touch $@

.PHONY: frameworks
frameworks: build/frameworks/.installed ## the tests of orphans, as root, with PyTorch, celery, gunicorn, Jupyter and loky for real
	build/frameworks/bin/python -m pytest tests/system/test_orphans.py tests/system/test_orphan_zoo.py $(PYTEST_ARGS)

# Grafana's own schema of dashboards comes from PyPI; Prometheus Debian and Ubuntu have as `prometheus`.
.PHONY: test-metrics
test-metrics: build/metrics/.installed ## test the alert rules with promtool, have a real Prometheus scrape a real daemon, and check the dashboard
	@command -v promtool >/dev/null && command -v prometheus >/dev/null || { \
	    echo 'skipped: there is no promtool and prometheus here (Debian and Ubuntu: apt-get install prometheus)'; exit 0; }; \
	promtool check rules packaging/prometheus/reaper-alerts.yml && \
	promtool test rules packaging/prometheus/reaper-alerts.test.yml && \
	build/metrics/bin/python -m pytest tests/metrics -v -rs $(PYTEST_ARGS)

# Streamlit, and what drives a browser. The browser is Debian's.
BROWSER = command -v chromium >/dev/null && command -v chromedriver >/dev/null

.PHONY: browser
browser:
	@$(BROWSER) || { echo 'this needs a browser and its driver: apt-get install chromium chromium-driver' >&2; exit 2; }
	@[ -n '$(ROOT)' ] || echo 'without root, only the tests that need no users of their own run: sudo make test-ui'

.PHONY: test-ui
test-ui: | browser build/ui/.installed ## the panel and the page in a real Chromium, as root; their pictures are in build/shots
	$(APART) build/ui/bin/python -m pytest tests/ui -rs $(PYTEST_ARGS)

.PHONY: joblib
joblib: $(STAMP) ## joblib's own tests of parallel loops, with the backend "reaper" among those that they are about
	@mkdir -p build/joblib
	REAPER_SOCKET=/nonexistent $(BIN)/python -W ignore tests/support/joblib_suite.py build/joblib -q -k reaper

.PHONY: sklearn
sklearn: $(STAMP) ## scikit-learn's own tests of callbacks, with Reaper's beside each of theirs and its joblib backend
	@mkdir -p build/sklearn
	@$(BIN)/python -m pip install -qq --disable-pip-version-check rich
	REAPER_SOCKET=/nonexistent $(BIN)/python -W ignore tests/support/sklearn_suite.py build/sklearn -q

# -- long runs ------------------------------------------------------------------------------------

EXAMPLES ?= 1000

.PHONY: interleavings
interleavings: $(STAMP) ## random lives of pools against the scan and its verdicts, more of them than in make test; EXAMPLES=n
	REAPER_TEST_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/unit/test_interleavings.py

MOMENTS ?= 20

.PHONY: moments
moments: $(STAMP) ## end a real grid search at random moments in nine ways, and resume it; MOMENTS=n take n minutes
	REAPER_TEST_MOMENTS=$(MOMENTS) $(BIN)/python -m pytest tests/system/test_moments.py $(PYTEST_ARGS)

# An environment of its own: a fuzzer is no dependency of anything. Where there is no wheel of it (another processor, a
# Python that is too new), inputs are made by chance, and the run says so.
FUZZ := build/fuzzing
FUZZ_STAMP := $(FUZZ)/.installed
FUZZ_RUNS ?= 100000
FUZZ_ARGS ?=

$(FUZZ_STAMP): pyproject.toml | $(STAMP)
	@echo 'preparing $(FUZZ) (once, and after a change of pyproject.toml)'
	@$(BIN)/python -m venv --clear $(FUZZ)
	@$(FUZZ)/bin/python -m pip install -qq --disable-pip-version-check -e .
	@$(FUZZ)/bin/python -m pip install -qq --disable-pip-version-check --only-binary :all: atheris || \
	    echo 'there is no wheel of atheris for this Python: inputs are made by chance'
	@touch $@

.PHONY: fuzz
fuzz: $(FUZZ_STAMP) ## feed hostile text to every parser (two minutes); FUZZ_RUNS=1000000, FUZZ_ARGS="--seed n --target page"
	@$(FUZZ)/bin/python tests/fuzz/run.py --runs $(FUZZ_RUNS) $(FUZZ_ARGS)

STEPS ?= 300
SEED ?=
SESSIONS ?= 4000

.PHONY: chaos
chaos: $(STAMP) ## random steps against a real daemon, every promise checked; STEPS=10000 takes 20 minutes, SEED=n repeats
	@$(APART) $(BIN)/python tests/chaos/run.py --steps $(STEPS) $(if $(SEED),--seed $(SEED))

.PHONY: attack
attack: $(STAMP) ## attack a real daemon at full length, as root (an hour or less); ATTACK_ARGS="--quick" for some minutes
	@$(BIN)/python tests/attack/run.py $(ATTACK_ARGS)

.PHONY: soak
soak: $(STAMP) ## sessions by the thousand, and what core and gate take meanwhile; SESSIONS=n
	@$(BIN)/python tests/chaos/soak.py --sessions $(SESSIONS)

SCALE_ARGS ?=

.PHONY: scale
scale: $(STAMP) ## measure 5,000 workers, 2,000 sessions and what forks itself each millisecond; SCALE_ARGS="--quick"
	@$(BIN)/python tests/scale/run.py $(SCALE_ARGS)

# An environment of its own: what Reaper is measured against is none of its dependencies.
BENCH := build/bench
BENCH_STAMP := $(BENCH)/.installed
BENCH_ARGS ?=

$(BENCH_STAMP): tests/bench/requirements.txt pyproject.toml | $(STAMP)
	@echo 'preparing $(BENCH) (once, and after a change of its requirements)'
	@$(BIN)/python -m venv --clear $(BENCH)
	@# Reaper for its dependencies alone: what is measured is the tree.
	@$(BENCH)/bin/python -m pip install -qq --disable-pip-version-check '.[train,alerts]' -r $<
	@$(BENCH)/bin/python -m pip uninstall -qq --yes reaperd
	@touch $@

.PHONY: bench
bench: $(STAMP) $(BENCH_STAMP) ## measure every promised figure beside others'; BENCH_ARGS="--quick": in three minutes
	@printf '%s\n' '$(CURDIR)' '$(CURDIR)/daemon' \
	    >"$$($(BENCH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tree.pth"
	@$(BENCH)/bin/python tests/bench/run.py $(BENCH_ARGS)

# -- what is published ----------------------------------------------------------------------------

DIST ?= dist
THIS_VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' daemon/reaperd/__init__.py)

.PHONY: dist
dist: $(STAMP) ## build the sdist and, from it, the wheel, in dist/
	@$(BIN)/python -m build --no-isolation --outdir '$(DIST)' . >/dev/null && ls -1 '$(DIST)'/reaperd-$(THIS_VERSION)*

DEB_REVISION ?= 1

.PHONY: deb
deb: $(STAMP) ## build a Debian package, in dist/, for the Debian or Ubuntu that this is
	@sh packaging/build-deb check
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || date +%s)} \
	    $(BIN)/python -m build --no-isolation --sdist --outdir '$(DIST)' . >/dev/null
	@sh packaging/build-deb '$(DIST)/reaperd-$(THIS_VERSION).tar.gz' '$(DEB_REVISION)' '$(DIST)'

REF ?= HEAD

.PHONY: fixtures
fixtures: $(STAMP) ## at a release, record what it says for the tests of those after it; VERSION=0.2.0, REF=commit
	@[ -n '$(VERSION)' ] || { echo 'say which: make fixtures VERSION=0.2.0' >&2; exit 2; }
	@$(BIN)/python tests/fixtures/record.py '$(VERSION)' --ref '$(REF)'

.PHONY: clean
clean: ## remove all that make made here
	rm -rf .venv .venv-* build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# -- on the machine -------------------------------------------------------------------------------

# DESTDIR stages the files for a package: no user is made then, and nothing is started.
DESTDIR ?=
PREFIX ?= /opt/reaper
BINDIR ?= /usr/local/bin
LIBDIR ?= /usr/local/lib
CONFDIR := /etc/reaper
STATEDIR := /var/lib/reaper
DATADIR ?= /usr/local/share
ZSHDIR ?= $(DATADIR)/zsh/site-functions
EXTRAS ?=
# Empty leaves it to who makes a package.
BYTECODE ?= yes

TARGET = $(DESTDIR)$(PREFIX)
FRESH = $(TARGET).new
UNITS = $(LIBDIR)/systemd/system/reaperd.service
USER_UNITS = $(LIBDIR)/systemd/user/reaperd.service
SYSUSERS = $(LIBDIR)/sysusers.d/reaper.conf
# What the wheel brings for the system, below its own share/ and below DATADIR.
PAGES := man/man1/reaperctl.1 man/man5/reaper.toml.5 man/man8/reaperd.8 \
    $(foreach c,reaperd reaperctl,bash-completion/completions/$c fish/vendor_completions.d/$c.fish)
ZSH_PAGES := _reaperd _reaperctl
LIVE := $(wildcard /run/systemd/system)
GATE_USER := reaper-gate

# The system's own Python first: one in somebody's home is out of the gate's reach, and may vanish with its owner.
INSTALL_PYTHON ?= $(eval INSTALL_PYTHON := $(shell \
    $(call first_python,/usr/bin/python3 /usr/local/bin/python3 $(PYTHON))))$(INSTALL_PYTHON)

.PHONY: rights
rights:
	@[ -n '$(ROOT)$(DESTDIR)' ] || { echo 'this needs root: sudo make $(MAKECMDGOALS) (or DESTDIR=... to stage)' >&2; exit 2; }
	@case '$(PREFIX)' in /?*) ;; *) echo 'PREFIX must be an absolute path' >&2; exit 2 ;; esac
	@[ -n '$(DESTDIR)' ] || [ ! -e /usr/lib/reaper/pyvenv.cfg ] || { \
	    echo 'the Debian package reaperd is installed, and has the same unit and user: apt-get remove reaperd first' >&2; \
	    exit 2; }
	@[ ! -e '$(TARGET)' ] || [ -e '$(TARGET)/pyvenv.cfg' ] || { \
	    echo '$(TARGET) exists and is no virtual environment: it is left alone. Choose another PREFIX' >&2; exit 2; }

.PHONY: install
install: rights ## install on this machine, as root: daemon, reaperctl, units, gate user, and start it
	$(call need,INSTALL_PYTHON)
	@# Made beside the old one and moved into its place when whole: a failed download costs nothing.
	@rm -rf '$(FRESH)'
	@$(INSTALL_PYTHON) -m venv '$(FRESH)'
	@'$(FRESH)/bin/python' -m pip install -qq --disable-pip-version-check --no-compile '.$(if $(EXTRAS),[$(EXTRAS)])'
	@'$(FRESH)/bin/python' -m pip uninstall -qq --yes setuptools  # Python 3.11 and older bring it; it slows every start
	@grep -rlI '$(FRESH)' '$(FRESH)/bin' '$(FRESH)/pyvenv.cfg' | while IFS= read -r file; do \
	    sed -i 's|$(FRESH)|$(PREFIX)|g' "$$file"; done
	@[ -z '$(BYTECODE)' ] || '$(FRESH)/bin/python' -m compileall -q -f -s '$(FRESH)' -p '$(PREFIX)' '$(FRESH)/lib'
	@for page in $(PAGES); do install -D -m 0644 "$(FRESH)/share/$$page" "$(DESTDIR)$(DATADIR)/$$page"; done
	@for page in $(ZSH_PAGES); do \
	    install -D -m 0644 "$(FRESH)/share/zsh/site-functions/$$page" "$(DESTDIR)$(ZSHDIR)/$$page"; done
	@cd '$(FRESH)/share' && rm -rf man bash-completion fish zsh
	@install -d '$(FRESH)/share/reaper' && cp -R config/. packaging/prometheus packaging/grafana '$(FRESH)/share/reaper/'
	@rm -rf '$(TARGET).old'
	@if [ -e '$(TARGET)' ]; then mv '$(TARGET)' '$(TARGET).old'; fi
	@mv '$(FRESH)' '$(TARGET)' && rm -rf '$(TARGET).old'
	@install -d '$(DESTDIR)$(BINDIR)'
	@for command in reaperd reaperctl; do ln -sfn "$(PREFIX)/bin/$$command" "$(DESTDIR)$(BINDIR)/$$command"; done
	@for unit in system user; do \
	    source=packaging/systemd/$$([ $$unit = system ] || echo user/)reaperd.service; \
	    install -d "$(DESTDIR)$(LIBDIR)/systemd/$$unit"; \
	    sed 's|/usr/local/bin/|$(BINDIR)/|g' "$$source" >"$(DESTDIR)$(LIBDIR)/systemd/$$unit/reaperd.service"; \
	    chmod 0644 "$(DESTDIR)$(LIBDIR)/systemd/$$unit/reaperd.service"; done
	@install -D -m 0644 packaging/systemd/reaper.sysusers.conf '$(DESTDIR)$(SYSUSERS)'
	@if [ -e '$(DESTDIR)$(CONFDIR)/reaper.toml' ]; then \
	    echo 'kept $(CONFDIR)/reaper.toml; every setting, with its default: $(PREFIX)/share/reaper/reaper.toml'; \
	else install -D -m 0644 config/reaper.toml '$(DESTDIR)$(CONFDIR)/reaper.toml'; fi
ifeq ($(DESTDIR),)
	@if command -v systemd-sysusers >/dev/null; then systemd-sysusers '$(SYSUSERS)'; \
	elif ! getent passwd $(GATE_USER) >/dev/null; then \
	    useradd --system --user-group --no-create-home --home-dir / --shell /usr/sbin/nologin $(GATE_USER); fi
ifneq ($(LIVE),)
	@systemctl daemon-reload && systemctl --quiet enable reaperd.service && systemctl restart reaperd.service
	@echo 'installed and started: systemctl status reaperd, reaperctl status'
else
	@echo 'installed; systemd does not run here, so start it yourself: $(BINDIR)/reaperd'
endif
else
	@echo 'staged below $(DESTDIR); at its place it still needs the user $(GATE_USER) ($(SYSUSERS))'
endif

.PHONY: uninstall
uninstall: rights ## take it off this machine; a changed configuration and the history stay
ifeq ($(DESTDIR),)
ifneq ($(LIVE),)
	@if systemctl cat reaperd.service >/dev/null 2>&1; then systemctl --quiet disable --now reaperd.service; fi
endif
endif
	@for file in reaper.toml; do \
	    if cmp -s '$(TARGET)/share/reaper/reaper.toml' '$(DESTDIR)$(CONFDIR)/reaper.toml'; then \
	        rm -f '$(DESTDIR)$(CONFDIR)/reaper.toml'; fi; done
	@rm -rf '$(TARGET)' '$(TARGET).new' '$(TARGET).old'
	@rm -f '$(DESTDIR)$(UNITS)' '$(DESTDIR)$(USER_UNITS)' '$(DESTDIR)$(SYSUSERS)' \
	    $(PAGES:%='$(DESTDIR)$(DATADIR)/%') $(ZSH_PAGES:%='$(DESTDIR)$(ZSHDIR)/%')
	@for command in reaperd reaperctl; do \
	    link='$(DESTDIR)$(BINDIR)'/$$command; \
	    [ "$$(readlink "$$link")" != "$(PREFIX)/bin/$$command" ] || rm -f "$$link"; done
ifeq ($(DESTDIR),)
	@if getent passwd $(GATE_USER) >/dev/null; then userdel $(GATE_USER); fi
ifneq ($(LIVE),)
	@systemctl daemon-reload
endif
endif
	@for folder in '$(CONFDIR)' '$(STATEDIR)'; do \
	    rmdir "$(DESTDIR)$$folder" 2>/dev/null || [ ! -e "$(DESTDIR)$$folder" ] || \
	        echo "kept $$folder, which is yours: rm -r $$folder removes it too"; done
	@echo 'uninstalled'
