# Everything runs in a virtual environment in this folder. PYTHON is any Python from 3.10 on.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
python = $(VENV)/bin/python
run = $(python) $(1).py config/charts.py --out_dir='$(OUT)'

help:
	@echo 'make demo       trains, samples and evaluates the whole method on optical test charts; writes to $(OUT)/'
	@echo 'make test       runs the tests (make coverage also counts the lines they reach, and takes longer)'
	@echo 'make figures    redraws the pictures of the README from what the demo (and the ablation) trained'
	@echo 'make ablation   trains the rows of Tables 3 and 4 at desk scale: hours, in pieces that resume'
	@echo 'make results    writes the tables of README.md and RESULTS.md from results/*.json'
	@echo 'make chaos      kills every long stage at random moments, restarts it, and compares with an undisturbed run'
	@echo 'make rehearsal  runs the protocol of the README on two CPU processes, shrunk, with stops and resumes'
	@echo 'make growth     computes memory, FLOPs and hours of every configuration on eight A100'
	@echo 'make lint       checks style and unused names'
	@echo 'make clean      removes $(OUT)/ (not $(VENV)/)'

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; make PYTHON=python3.12 takes another")'
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet -r requirements.txt pytest pytest-xdist pytest-cov ruff matplotlib
	touch $@

demo: $(VENV)/installed
	$(call run,train_tokenizer)
	$(call run,encode)
	$(call run,train_fvar)
	$(call run,sample)
	$(call run,evaluate)

test: $(VENV)/installed
	$(python) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

coverage: $(VENV)/installed
	$(python) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term tests

chaos: $(VENV)/installed
	$(python) tests/chaos.py

rehearsal: $(VENV)/installed
	$(python) tests/rehearsal.py

lint: $(VENV)/installed
	$(python) -m ruff check .

growth: $(VENV)/installed
	EVERY_SIZE=1 $(python) -m pytest -q tests/test_gpu_memory.py
	$(python) tests/growth.py

ablation: $(VENV)/installed
	$(python) -m experiments.ablation --processes=2

results: $(VENV)/installed
	$(python) -m experiments.results

figures: $(VENV)/installed
	$(python) pyramid.py halftone_dots --patch_nums=1,2,4,8,16 --out=figures/pyramid.png
	$(call run,sample)
	cp '$(OUT)/tokenizer.png' '$(OUT)/samples.png' '$(OUT)/progress.png' figures/
	$(call run,sample) --classes=0,1,7,8,9
	cp '$(OUT)/focus.gif' figures/
	$(call run,sample) --per_class=6 --edit=checkerboard --mask=8,8,24,24
	cp '$(OUT)/edit.png' figures/inpainting.png
	$(call run,sample) --per_class=6 --edit=slanted_edge --mask=0,0,16,32 --class=7
	cp '$(OUT)/edit.png' figures/class_edit.png
	$(call run,sample) --per_class=6 --edit=concentric_rings --outpaint=8,8,8,8 --class=7
	cp '$(OUT)/outpaint.png' figures/outpainting.png
	$(python) pyramid.py text --image_size=32 --blur=2 --out='$(OUT)/blurred.png'
	$(call run,sample) --per_class=6 --refocus='$(OUT)/blurred.png' --radius=2
	cp '$(OUT)/refocus.png' figures/refocusing.png
	test ! -d out-ablation || $(python) -m experiments.ablation --figures

clean:
	rm -rf '$(OUT)'

.PHONY: help demo test coverage chaos rehearsal growth lint ablation results figures clean
