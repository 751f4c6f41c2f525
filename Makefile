# SPDX-License-Identifier: Apache-2.0
# Every target does its own set-up: a machine needs python3 >= 3.11 with pip and venv, and, for the fast back end, a
# C++ compiler. Everything is installed in .venv, at the versions of constraints.txt.
#   make demo     train a small network on handwritten digits through update_model
#   make demo-tf  the same in Keras, on TensorFlow, which it installs
#   make test     the tests, without those of minutes (make slow), in JOBS=2 processes
#   make test-tensorflow   those of the TensorFlow half, in their own process (make test runs them too)
#   make lint     formats, lints and types, as CI demands them; make format mends what can be mended
#   make bench    the benchmarks: 25 minutes; BENCH=--quick, five; BENCH='--minutes 12', so many; docs/benchmarks.md
#   make bench-apart  the updates of FastEstimator and Keras, each in a process of its own
#   make bench-keras  a Keras step beside Keras's own, eager, in tf.function and compiled
#   make bench-check  a few ratios to torch again, beside the committed ones: three minutes
#   make check-memory  tests of layouts and memory with the compiled module under sanitizers
#   make predicted  bytes and launches on GPUs, counted, and the times that they allow
#   make cuda     the CUDA module for every architecture, beside the sources: needs nvcc, no GPU, and four minutes (ARCHS="90")
#   make gpu-emulate  every rule, storage and option of the CUDA kernels, run on the CPU, also under sanitizers and by their PTX
#   make gpu      all that waits for a GPU: tests on it, sanitizers, graphs, benchmarks (RESULTS=folder); makes no .venv
#   make gpu-static  registers, loads and arithmetic of every CUDA kernel's machine code (ARCHS="90", WRITE=1)
#   make venv     only the virtual environment, to install another build of torch in it first
PYTHON ?= python3
VENV ?= .venv
PYTEST ?=
# Processes of make test. A file's tests stay in one: they share what they compile. The files go out in their order and not by
# their number of tests, for those that compile are few tests, and long.
JOBS ?= 2
side_by_side := -n $(JOBS) --dist loadfile --no-loadscope-reorder
bin := $(VENV)/bin
# A stamp is newer than what it was made of, or it is made again.
venv := $(VENV)/.stamp-venv
tools := $(VENV)/.stamp-tools
installed := $(VENV)/.stamp-installed
tensorflow := $(VENV)/.stamp-tensorflow
triton := $(VENV)/.stamp-triton
peers := $(VENV)/.stamp-peers
pip := $(bin)/python -m pip --disable-pip-version-check
compiled_from := setup.py CMakeLists.txt pyproject.toml pyupdate/__init__.py \
	$(wildcard kernels/*.py kernels/*/*.py csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/cuda/*)
cpp = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: install venv triton demo demo-tf test test-tensorflow slow lint format bench bench-apart bench-keras bench-check predicted check-aarch64 check-memory check-device cuda gpu gpu-emulate gpu-static clean
.DELETE_ON_ERROR:

install: $(installed)

venv: $(venv)

triton: $(triton)

$(venv):
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "pyupdate needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# The requirements of pyproject.toml's extra "dev", read from it: the editable install below then needs no network.
$(tools): $(venv) constraints.txt pyproject.toml
	$(pip) install -q -c constraints.txt setuptools cmake ninja pybind11
	PYUPDATE_PURE_PYTHON=1 PYUPDATE_REQUIRE_COMPILED= PYUPDATE_CUDA= $(pip) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# Editable, the compiled module beside the sources. pip hides what a build says, so what it recorded is shown. Without the
# module the stamp is not made: the next make tries again.
$(installed): $(tools) $(compiled_from)
	$(pip) install -q --no-deps --no-build-isolation -e .
	@$(bin)/python -c 'import json; r = json.load(open("pyupdate/_build_info.json")); \
	  print("pyupdate: compiled by", r["compiler"]) if r["compiled"] else \
	  print("pyupdate: NOT COMPILED, so updates run in pure Python. Why:", r["reason"])'
	@if grep -q '"compiled": true' pyupdate/_build_info.json; then touch $@; fi

demo: $(installed)
	$(bin)/python examples/digits.py

demo-tf: $(installed) $(tensorflow)
	@if [ -e $(tensorflow) ]; then set -x; $(bin)/python examples/digits_keras.py; fi

test: $(installed)
	$(bin)/python -m pytest -m 'not slow' $(side_by_side) $(PYTEST)
	$(MAKE) test-tensorflow

# Without the wheels (no network, another machine) every file is skipped with its reason. tf-keras asks for a package named
# tensorflow, which would come beside tensorflow-cpu: so without its dependencies.
test-tensorflow: $(installed) $(tensorflow)
	$(bin)/python -m pytest -m 'not slow' tests_tensorflow $(side_by_side) $(PYTEST) || [ $$? -eq 5 ] # 5: it ran none

$(tensorflow): $(tools) constraints.txt
	if $(pip) install -q -c constraints.txt tensorflow-cpu && $(pip) install -q -c constraints.txt --no-deps tf-keras; then touch $@; \
	else echo "SKIPPED what needs TensorFlow: pip could not install tensorflow-cpu and tf-keras at the versions of constraints.txt" >&2; fi

slow: $(installed) $(tensorflow)
	$(bin)/python -m pytest -m slow $(PYTEST)
	$(bin)/python -m pytest -m slow tests_tensorflow $(PYTEST) || [ $$? -eq 5 ] # 5: it ran none

# Goes on where it was interrupted or its minutes were over. BENCH=--quick, BENCH='--section rules --rule Lion' and others: benchmarks/run.py --help.
BENCH ?=
bench: $(installed) $(tensorflow) $(peers)
	$(bin)/python benchmarks/run.py $(BENCH)

bench-apart: $(installed) $(tensorflow) $(peers)
	$(bin)/python benchmarks/apart.py

bench-keras: $(installed) $(tensorflow)
	@if [ -e $(tensorflow) ]; then set -x; $(bin)/python benchmarks/keras_steps.py; fi

bench-check: $(installed)
	$(bin)/python benchmarks/gate.py

# Without a library its rows say that it is absent; the next make tries again.
$(peers): $(tools) constraints.txt benchmarks/requirements.txt
	@mkdir -p build; missing=; grep -v '^#' benchmarks/requirements.txt | { while read -r line; do \
	  $(pip) install -q -c constraints.txt --no-deps $$line </dev/null || { missing=1; echo "bench: SKIPPED: pip could not install $${line%% *}" >&2; }; \
	done; if [ -z "$$missing" ]; then touch $@; fi; }
	@$(bin)/python benchmarks/peers.py --build >build/peers.log 2>&1 || echo "bench: DeepSpeed's kernels: see build/peers.log" >&2

predicted: $(installed)
	$(bin)/python benchmarks/predicted.py

lint: $(tools)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(cpp)
	$(bin)/mypy --strict pyupdate kernels

format: $(tools)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp)

# The whole module for a 64-bit ARM processor, by Debian's g++-aarch64-linux-gnu. Python's headers are the host's: the two
# have the same type sizes. Debian's Python looks for its pyconfig.h by the target's name, so that leads to the host's too.
# AARCH64_BUILD=Compiled, which is no type that CMake knows, leaves out -O3: a third of the time.
AARCH64_CXX ?= aarch64-linux-gnu-g++
AARCH64_BUILD ?= Release
check-aarch64: $(installed)
	@command -v $(AARCH64_CXX) >/dev/null || { echo "check-aarch64: no $(AARCH64_CXX); on Debian: apt-get install g++-aarch64-linux-gnu" >&2; exit 1; }
	@rm -rf build/aarch64 && mkdir -p build/aarch64/headers
	@ln -s /usr/include/$$($(bin)/python -c 'import sysconfig; print(sysconfig.get_config_var("MULTIARCH"))') build/aarch64/headers/aarch64-linux-gnu
	$(bin)/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) -DPython_EXECUTABLE=$(abspath $(bin)/python) \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(AARCH64_CXX) \
	  -DCMAKE_BUILD_TYPE=$(AARCH64_BUILD) \
	  -DCMAKE_CXX_FLAGS="-isystem $(abspath build/aarch64/headers)" -DPYUPDATE_WERROR=ON
	$(bin)/cmake --build build/aarch64

# The compiled module under AddressSanitizer and UndefinedBehaviorSanitizer, in a Python that is built without: their libraries
# are loaded first, and torch's allocations are theirs. The build takes five minutes of two cores. CHECK=tests/test_bitwise.py
# chooses other tests.
CHECK ?= tests/test_memory.py tests/test_layouts.py tests/test_refusals.py tests/test_stages.py tests/test_clip.py \
	tests/test_drain.py tests/test_swapped.py tests/test_ahead.py tests/test_state_dtype.py
sanitizers := address undefined
check-memory: $(installed)
	@rm -rf build/memory && mkdir -p build/memory/site
	$(bin)/cmake -S . -B build/memory/module -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) -DPython_EXECUTABLE=$(abspath $(bin)/python) \
	  -DCMAKE_CXX_FLAGS="$(sanitizers:%=-fsanitize=%) -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
	$(bin)/cmake --build build/memory/module
	cp -RL pyupdate build/memory/site && rm -f build/memory/site/pyupdate/_C*.so && cp build/memory/module/_C*.so build/memory/site/pyupdate
	export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(abspath build/memory/site) \
	  LD_PRELOAD="$$(for one in libasan.so libubsan.so libstdc++.so; do $(CXX) -print-file-name=$$one; done | tr '\n' ' ')"; \
	  $(bin)/python -P -c 'from pyupdate import _C; print(_C.__file__)' && $(bin)/python -P -m pytest -m 'not slow' $(CHECK) $(PYTEST)

# What GPUs run, as far as it can be held without one: element.h and reduce.h with AdamW become PTX by nvcc, and the Triton
# kernels PTX and AMD code, in which no operation breaks the numeric contract; then the Triton back end steps CPU tensors by
# its PTX. A skip is printed with its reason.
NVCC ?= nvcc
check-device: $(installed) $(triton)
	@mkdir -p build/device
	$(bin)/python -m pyupdate.kernels.emit_cpp --output build/device/rules_generated.h
	@if command -v $(NVCC) >/dev/null; then set -ex; \
	  $(NVCC) -ptx -std=c++20 -arch=sm_80 -fmad=false -Werror all-warnings -Icsrc -Ibuild/device tests/device/adamw_ptx.cu -o build/device/adamw.ptx; \
	  grep -c '^.visible .entry' build/device/adamw.ptx; \
	  ! grep -nE '\b(fma|mad)\.(rn\.)?f|\.approx|\.ftz|div\.full' build/device/adamw.ptx; \
	else echo "check-device: SKIPPED nvcc -ptx: no $(NVCC) on PATH"; fi
	@if [ -e $(triton) ]; then set -ex; $(bin)/python tests/device/triton_compile.py; \
	  $(bin)/python -m pytest -m 'not slow' tests/test_triton.py tests/test_triton_rows.py tests/test_triton_drain.py tests/test_machine_code.py $(side_by_side) $(PYTEST); fi

# torch for CPUs comes without it. Whoever has another one keeps it.
TRITON ?= triton==3.9.0
$(triton): $(tools)
	if $(bin)/python -c 'import triton' 2>/dev/null || $(pip) install -q '$(TRITON)'; then touch $@; \
	else echo "SKIPPED the Triton kernels: triton is not installed, and pip could not install $(TRITON)" >&2; fi

# On the day that there is a GPU, with a Python that has torch, numpy, pybind11 and pytest: PYTHON=... chooses it. One JSON
# and one SVG go to RESULTS. Without a GPU it says so and succeeds.
RESULTS ?= build/gpu
gpu:
	$(PYTHON) benchmarks/gpu.py --results "$(RESULTS)"

# As PYUPDATE_CUDA=1 has an install build it; a module of more than 40 MB is a failure.
cuda: $(installed)
	PYUPDATE_CUDA=1 $(if $(filter command line environment,$(origin ARCHS)),PYUPDATE_CUDA_ARCHS="$(ARCHS)") $(bin)/python benchmarks/cuda_build.py

# Every rule, storage and option of the CUDA kernels, which run here as host C++, also under sanitizers, and by their PTX;
# `make test` has a part of it. EMULATE=tests/test_cuda_sanitized.py runs one of the files.
EMULATE ?= tests/test_cuda_on_cpu.py tests/test_cuda_faults.py tests/test_cuda_sanitized.py tests/test_cuda_ptx.py
gpu-emulate: $(installed)
	$(bin)/python -m pytest $(EMULATE) $(PYTEST)

# What ptxas makes of every CUDA kernel; says what it skips. WRITE=1 writes the tables of docs/gpu.md.
ARCHS ?= 80 86 89 90 100 120
WRITE ?=
gpu-static: $(installed)
	cd tests && $(abspath $(bin)/python) -m device.machine_code --archs $(ARCHS) $(if $(WRITE),--write)

clean:
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f pyupdate/_C*.so pyupdate/_cuda*.so pyupdate/_build_info.json $(installed)
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
