#!/bin/bash
# A SLURM of its own on loopback, in FOLDER: munged, slurmctld and NODES times slurmd. It ends when this script does.
#
#   bash slurm_loopback.sh FOLDER [NODES] [CPUS OF EACH]
#
# Nodes have addresses as names, since torchrun looks them up. Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge. Prints the line that the others need, when all nodes
# are up: export SLURM_CONF=...
set -euo pipefail
folder=$(realpath -- "$1")
nodes=${2:-1}
cpus=${3:-4}
host=$(hostname -s)
port=$((20000 + RANDOM % 20000))
mkdir -p "$folder"/{state,spool,log}
for each in $(seq "$nodes"); do mkdir -p "$folder/spool/127.0.0.$each"; done
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"

cat > "$folder/slurm.conf" << END
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=200000,sched_interval=1,batch_sched_delay=0
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MessageTimeout=30
KillWait=30
MinJobAge=3600
$(for each in $(seq "$nodes"); do
  echo "NodeName=127.0.0.$each NodeHostname=$host NodeAddr=127.0.0.$each Port=$((port + each)) CPUs=$cpus RealMemory=1000 State=UNKNOWN"
done)
PartitionName=all Nodes=127.0.0.[1-$nodes] Default=YES MaxTime=INFINITE State=UP
END

export SLURM_CONF=$folder/slurm.conf
started=()
finish() {
  trap - EXIT INT TERM
  kill "${started[@]}" 2> "$folder/log/end" || true
  wait
}
trap finish EXIT
trap 'exit 143' INT TERM

munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed" &
started+=($!)
until [ -S "$folder/munge.socket" ]; do sleep 0.1; done
slurmctld -D &
started+=($!)
for each in $(seq "$nodes"); do
  slurmd -D -N "127.0.0.$each" &
  started+=($!)
done
until [ "$(sinfo --noheader --Node --states=idle --format=%N 2> "$folder/log/sinfo" | sort -u | wc -l)" = "$nodes" ]; do
  for process in "${started[@]}"; do
    kill -0 "$process" 2> "$folder/log/sinfo" || { tail -n 5 "$folder"/log/*.log >&2; exit 1; }
  done
  sleep 0.2
done
echo "export SLURM_CONF=$SLURM_CONF"
wait
