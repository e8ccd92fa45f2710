#!/bin/bash
# A merge by the tasks of a Slurm array, on a file system that all nodes see. A task that is killed is started again by
# --requeue, and makes only what is missing.
#
#   streammerge plan chat/ code/ --base base/ --method ties -o merged/ --memory 4GiB --save merge.plan
#   tasks=$(sbatch --parsable examples/slurm.sh merge.plan)
#   sbatch --dependency=afterok:$tasks --wrap "streammerge finish merge.plan"
#
#SBATCH --job-name=streammerge
#SBATCH --array=0-7
#SBATCH --cpus-per-task=8
#SBATCH --mem=6G
#SBATCH --time=02:00:00
#SBATCH --requeue
set -euo pipefail
# The worker takes its share from SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT.
exec srun streammerge worker "$1" --workers "${SLURM_CPUS_PER_TASK:-1}" --no-progress
