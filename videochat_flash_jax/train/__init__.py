"""Trains a model from a config. The step is a pure function; files, logs and signals are the run's.

| file                   | what it does |
|------------------------|--------------|
| `settings`             | every field of a config, with its meaning and what a resume may change |
| `config`               | from a config file to checked settings, and the table of its fields |
| `loop`                 | from a config to its runs: one, or several stages |
| `workdir`              | the directory of a run is checked and prepared |
| `initial_weights`      | where the first weights come from |
| `run`                  | one run: its steps, and what happens between them |
| `program`              | the step of a config on given devices, with all shapes and shardings |
| `step`                 | the training step as a pure function |
| `losses`               | the loss of answers, without the logits of all tokens in memory |
| `objectives`           | what a run can train a model to do |
| `patch_classification` | the objective of stage 0 of the tiny model |
| `optimizer`            | AdamW and Muon, with one learning rate for each weight |
| `lora`                 | trained adapters beside frozen linear layers |
| `batches`              | the batches of a run, from a mixture or from the synthetic world |
| `device_batches`       | copies batches to the devices, one batch ahead |
| `dropout_plans`        | adds plans of token dropout to batches |
| `metrics`              | logs: files, TensorBoard, and a line of progress |
| `flops`                | the operations of a step, counted by hand |
| `preemption`           | a signal ends a run after its current step |
| `profile`              | records some steps for TensorBoard |
"""
