"""`llmtrain pretrain`: the training loop and everything it saves.

A batch flows from `data.dataloader` through `Trainer.step` (forward, backward),
`SpikeDetector.check`, `AdamW.update` and `OnlineAverage.update` to `MetricsLog.training`. Allowed
imports: all layers below (`planning`, `averaging`, `evaluation`, `data`, `checkpoints`, `model`,
`config`, `runtime`, `storage`).

- `run.py`: `pretrain`, which starts or resumes a run
- `resume.py`: where a run starts: resume, branch, rewind
- `trainer.py`: the loop: steps, evaluations, saves
- `worker.py`: the model in one process: DDP, FSDP, torch.compile
- `micro_batch.py`: find the micro-batch; reduce it when memory runs out
- `initial.py`: start from existing weights
- `spikes.py`: detect spikes and non-finite numbers
- `checkpoint.py`, `checkpoint_writer.py`: training checkpoints, from which a run resumes
- `snapshots.py`: snapshots and online averages, weights only
- `metrics.py`, `dashboards.py`: events for the terminal, `metrics.jsonl`, W&B and TensorBoard
- `time_left.py`: prediction of the remaining time
- `optimizers/`: AdamW, Muon, SPAM
"""
