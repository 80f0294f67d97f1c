"""What a GPU does with dllmc's operators, programs and engine, and with the decoders that one would write without it.

`python -m benchmarks.gpu` runs the sections one after the other, each in a process of its own with its own budget of
time, and writes `benchmarks/results/<gpu>.json` as they go:

    kernels  each operator at the shapes that serving has, beside torch's own, over the roofline that was measured
    memory   what an engine plans beside what it allocates, and what a step allocates: nothing
    decode   tokens a second and latencies, beside `benchmarks/baselines.py`, eager and compiled
    where    a Refresh and a Reuse step, operator by operator, over their roofline

No checkpoint is needed: weights are random, shapes are LLaDA-8B's and Dream-7B's. Nothing is written that was not
measured: what failed, ran out of memory or of time says so in its record.
"""
