#!/bin/bash
# AdvDMD on several nodes under SLURM: sbatch examples/slurm.sh
# Shortly before the time runs out SLURM signals the run; after that cycle (SaveOnSignal, in every recipe) Lightning
# writes a checkpoint and puts the job back into the queue, and the next start goes on from that checkpoint.
#SBATCH --job-name=advdmd
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8        # one task per GPU, as Lightning expects
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@300       # seconds before the end; more than one cycle and one checkpoint take

source .venv/bin/activate
# hsdp cuts the weights over the GPUs of a node and replicates the nodes; fsdp2 cuts them over all GPUs.
srun advdmd fit --config "${RECIPE:-shapes_4step}" \
    --trainer.num_nodes "$SLURM_NNODES" \
    --trainer.devices 8 \
    --trainer.strategy hsdp \
    --trainer.precision bf16-mixed
