# On a fresh machine with Python and make: `make demo` shows the line at work, `make test` tests it.
PYTHON ?= python3
BIN := .venv/bin
# The pins are for Python 3.11 and newer; an older Python takes what pyproject.toml allows.
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: reference demo test test-browser test-faults test-anomalib check format bench accuracy limits soak swaps restarts plc fuzz clean install install-venv install-files uninstall own-folder

.venv/.installed: pyproject.toml constraints.txt $(wildcard daemon/inspection/backend/kernels/nearest_*.[ch])
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), wanted Python 3.10 or newer: make PYTHON=python3.11" >&2; exit 64; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[train,demo,plc,dashboard,dev]'
	# TensorRT's types for mypy alone: beside the other packages they would pass for tensorrt itself, and with what they
	# depend on they would be it. Its generator left five lines that are no Python: docs/decisions.md.
	rm -rf .venv/stubs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) --no-deps --target .venv/stubs tensorrt-stubs
	sed -i -E 's/\bin: list/in_: list/; s/, channel_axis: int\)/, channel_axis: int = ...)/' .venv/stubs/tensorrt_bindings/tensorrt.pyi
	touch $@

demo: .venv/.installed  ## keys, an engine from 300 solar cells, the daemon, 400 cells at 25 a second
	$(BIN)/python -m examples.demo

test: .venv/.installed  ## everything that CI tests: first three files at a time, then what must be alone
	$(BIN)/python -m pytest -n 3 --dist loadfile -m 'not alone'
	$(BIN)/python -m pytest -m alone

test-browser: .venv/.installed  ## the dashboard in a real Chromium (Debian: chromium); part of make test
	$(BIN)/python -m pytest tests/browser

test-faults: .venv/.installed  ## what breaks a running daemon on purpose; part of make test
	$(BIN)/python -m pytest tests/faults

test-anomalib: .venv/.installed  ## anomalib's own PatchCore through `inspectd import`; makes bench/.peer, several GB
	$(BIN)/python -m pytest tests/with_anomalib.py

check: .venv/.installed  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.installed  ## times through the sockets and the demo, recorded; then the table in README
	$(BIN)/python -m bench.line
	$(BIN)/python -m bench.demo
	$(BIN)/python -m bench.tables

accuracy: .venv/.installed  ## make accuracy DATA=folder; what is missing in bench/results/accuracy.json; hours
	$(BIN)/python -m bench.accuracy --data $(DATA)
	$(BIN)/python -m bench.tables

reference: .venv/.installed  ## docs/reference.md, the manual page and the completion, from the code
	$(BIN)/python -m bench.reference
	$(BIN)/python -m examples.grafana_dashboard

limits: .venv/.installed  ## make limits DATA=folder: does the limit keep its word; some 7 minutes
	$(BIN)/python -m bench.limits --data $(DATA)

MINUTES ?= 60
soak: .venv/.installed  ## make soak MINUTES=60; full load with faults at random, the books, memory and times by minute
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

swaps: .venv/.installed  ## 200 engine swaps under load; some 5 minutes
	$(BIN)/python -m bench.swaps

restarts: .venv/.installed  ## 20 rounds of kill -9 under 100 frames a second; some 2 minutes
	$(BIN)/python -m bench.restarts

plc: .venv/.installed  ## 2,000 parts into a PLC three ways while daemon, bridge and PLC are killed; some 6 minutes
	$(BIN)/python -m bench.plc

RUNS ?= 1000000
JOBS ?= 2
fuzz: .venv/.installed  ## make fuzz RUNS=1000000; every parser under atheris, bench/results/fuzz.json; hours
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --runs $(RUNS) --jobs $(JOBS)

clean:
	rm -rf .venv demo *.egg-info .mypy_cache .pytest_cache .ruff_cache

# As a service (docs/install.md). With DESTDIR, for packagers, no account is made and nothing is started.
DESTDIR ?=
PREFIX ?= /opt/inspectd
# EXTRAS=gpu for an NVIDIA card; VENV_OPTIONS=--system-site-packages for a Jetson, whose TensorRT comes with JetPack.
EXTRAS ?=
VENV_OPTIONS ?=
HOUSE = $(DESTDIR)$(PREFIX)
UNITS = $(DESTDIR)/usr/lib/systemd/system
STATE = $(DESTDIR)/var/lib/inspectd
SHOWN = $(DESTDIR)/var/lib/inspectd-dashboard
MANUAL = $(DESTDIR)/usr/share/man/man1
COMPLETION = $(DESTDIR)/usr/share/bash-completion/completions
TO_PREFIX = sed 's|/opt/inspectd|$(PREFIX)|g'

own-folder:
	@test '$(notdir $(PREFIX))' = inspectd || { \
		echo "PREFIX is $(PREFIX), wanted a folder of its own that is named inspectd: uninstall removes it" >&2; exit 64; }

install: install-venv install-files  ## in /opt/inspectd, with an account of its own; starts nothing
ifeq ($(DESTDIR),)
	systemd-sysusers /usr/lib/sysusers.d/inspectd.conf /usr/lib/sysusers.d/inspectd-dashboard.conf
	systemd-tmpfiles --create /usr/lib/tmpfiles.d/inspectd.conf /usr/lib/tmpfiles.d/inspectd-dashboard.conf
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
endif

install-venv: own-folder
	@case "$$(readlink -f "$$(command -v $(PYTHON))")" in /home/*|/root/*) \
		echo "$(PYTHON) lies in a home folder, which the service cannot see; name another one: make install PYTHON=/usr/bin/python3" >&2; \
		exit 64;; esac
	umask 022 && $(PYTHON) -m venv $(VENV_OPTIONS) $(HOUSE)
	umask 022 && $(HOUSE)/bin/python -m pip install --quiet --disable-pip-version-check $(PINS) '.$(if $(EXTRAS),[$(EXTRAS)])'
ifneq ($(DESTDIR),)
	grep -rlIZ '$(HOUSE)' $(HOUSE)/bin $(HOUSE)/pyvenv.cfg | xargs -0r sed -i 's|$(HOUSE)|$(PREFIX)|g'
endif

install-files: own-folder
	install -d -m 0755 $(HOUSE) $(HOUSE)/share $(HOUSE)/share/dropins $(HOUSE)/share/doc
	install -d -m 0755 $(UNITS) $(DESTDIR)/usr/lib/sysusers.d $(DESTDIR)/usr/lib/tmpfiles.d $(MANUAL) $(COMPLETION)
	for name in inspectd.service inspectd-plc@.service inspectd-camera@.service inspectd-dashboard.service; do \
		$(TO_PREFIX) systemd/$$name | install -m 0644 /dev/stdin $(UNITS)/$$name || exit; done
	for name in nvidia jetson; do \
		$(TO_PREFIX) systemd/dropins/$$name.conf | install -m 0644 /dev/stdin $(HOUSE)/share/dropins/$$name.conf || exit; done
	for name in install plc cameras dashboard review; do \
		$(TO_PREFIX) docs/$$name.md | install -m 0644 /dev/stdin $(HOUSE)/share/doc/$$name.md || exit; done
	for name in inspectd inspectd-dashboard; do \
		install -m 0644 systemd/$$name.sysusers $(DESTDIR)/usr/lib/sysusers.d/$$name.conf || exit; \
		install -m 0644 systemd/$$name.tmpfiles $(DESTDIR)/usr/lib/tmpfiles.d/$$name.conf || exit; done
	install -m 0644 share/inspectd.1 $(MANUAL)/inspectd.1
	install -m 0644 share/inspectd.bash $(COMPLETION)/inspectd
	test -d $(STATE) || install -d -m 0750 $(STATE)
	test -e $(STATE)/config.yaml || install -m 0644 config.yaml $(STATE)/config.yaml
	test -d $(SHOWN) || install -d -m 0700 $(SHOWN)
	test -e $(SHOWN)/dashboard.yaml || sed -e 's|^daemon: config.yaml   |daemon: /var/lib/inspectd/config.yaml|' \
		-e 's|keys/dashboard.peer.yaml|dashboard.peer.yaml     |' dashboard.yaml | install -m 0644 /dev/stdin $(SHOWN)/dashboard.yaml

uninstall: own-folder  ## leaves the account, /var/lib/inspectd and what you put into /etc
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then systemctl disable --now inspectd.service inspectd-dashboard.service; \
		systemctl stop 'inspectd-camera@*.service' 'inspectd-plc@*.service'; \
		systemctl disable inspectd-camera@.service inspectd-plc@.service; fi
endif
	for name in inspectd.service inspectd-plc@.service inspectd-camera@.service inspectd-dashboard.service; do \
		rm -f $(UNITS)/$$name || exit; done
	for name in inspectd inspectd-dashboard; do \
		rm -f $(DESTDIR)/usr/lib/sysusers.d/$$name.conf $(DESTDIR)/usr/lib/tmpfiles.d/$$name.conf || exit; done
	rm -f $(MANUAL)/inspectd.1 $(COMPLETION)/inspectd
	rm -rf $(HOUSE)
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
endif
