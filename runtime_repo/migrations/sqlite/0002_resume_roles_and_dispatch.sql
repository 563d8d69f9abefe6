-- Queues, priorities, payloads, results and fencing for attempts; answers for interrupts; roles for API keys.
-- Every NOT NULL column has a constant default: rows stay where they are and the statement stays cheap.
--
-- An attempt's row is the truth. What waits, what is held and what has ended is found by narrow tables beside it, so
-- that no column which a claim or a completion changes in it is indexed.

alter table {schema}.runtime_attempts add column queue text not null default 'default';
alter table {schema}.runtime_attempts add column priority integer not null default 0;
alter table {schema}.runtime_attempts add column payload_json text;
alter table {schema}.runtime_attempts add column max_attempts integer not null default 10;
alter table {schema}.runtime_attempts add column lease_version integer not null default 0;
alter table {schema}.runtime_attempts add column worker_id text;
alter table {schema}.runtime_attempts add column enqueued_at_ms integer not null default 0;
alter table {schema}.runtime_attempts add column started_at_ms integer;
alter table {schema}.runtime_attempts add column finished_at_ms integer;
alter table {schema}.runtime_attempts add column result_json text;
alter table {schema}.runtime_attempts add column error text;
alter table {schema}.runtime_attempts add column lease_id text;
alter table {schema}.runtime_attempts add column ended_by text;
alter table {schema}.runtime_attempts add column headers_json text;

alter table {schema}.runtime_step_reports add column payload_json text;
alter table {schema}.runtime_step_reports add column lease_version integer;

alter table {schema}.runtime_interrupts add column resume_payload_json text;
alter table {schema}.runtime_interrupts add column resume_payload_hash text;
alter table {schema}.runtime_interrupts add column resumed_at_ms integer;

alter table {schema}.runtime_api_keys add column role text not null default 'operator';

-- One row for each switch of the operator's.
create table {schema}.runtime_control (
    name          text not null primary key,
    value_json    text not null,
    updated_at_ms integer not null
);

-- It would cost a third of the claims.
drop index if exists {schema}.idx_runtime_attempts_status_retry;

-- Made anew, below, with what a page is ordered by.
drop index if exists {schema}.idx_runtime_interrupts_status;
drop index if exists {schema}.idx_runtime_jobs_status;
drop index if exists {schema}.idx_runtime_audit_logs_request;

-- SQLite accepts a NULL in a text primary key, and no verb could name such a row: it gets an id that nothing else has.
update {schema}.runtime_attempts set attempt_id = 'without-id-' || lower(hex(randomblob(16))) where attempt_id is null;
update {schema}.runtime_leases set lease_id = 'without-id-' || lower(hex(randomblob(16))) where lease_id is null;
update {schema}.runtime_jobs set thread_id = 'without-id-' || lower(hex(randomblob(16))) where thread_id is null;
update {schema}.runtime_interrupts set interrupt_id = 'without-id-' || lower(hex(randomblob(16))) where interrupt_id is null;
update {schema}.runtime_api_keys set key_id = 'without-id-' || lower(hex(randomblob(16))) where key_id is null;

-- What version 1 left ambiguous. Tokens go on from the lease that lives, so that no token is given out twice.
update {schema}.runtime_attempts
   set lease_version = l.version, lease_id = l.lease_id
  from {schema}.runtime_leases as l
 where l.attempt_id = runtime_attempts.attempt_id;

-- A lease on a final or missing attempt owns nothing.
delete from {schema}.runtime_leases
 where not exists (
           select 1 from {schema}.runtime_attempts as a
            where a.attempt_id = runtime_leases.attempt_id and a.status not in ('completed', 'failed', 'cancelled'));

-- Leases are found by their attempts. SQLite changes no table's key, so it is made anew, and once more under its own name:
-- to rename one would change what views and triggers say that name it. An index of the operator's goes with the old one.
-- Without rowids the key is the table.
create table {schema}.runtime_leases_being_moved (
    lease_id            text not null,
    attempt_id          text not null,
    worker_id           text not null,
    lease_expires_at_ms integer not null,
    heartbeat_at_ms     integer not null,
    version             integer not null
);

insert into {schema}.runtime_leases_being_moved
       (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version)
select lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version
  from {schema}.runtime_leases;

drop table {schema}.runtime_leases;

create table {schema}.runtime_leases (
    lease_id            text not null,
    attempt_id          text not null primary key,
    worker_id           text not null,
    lease_expires_at_ms integer not null,
    heartbeat_at_ms     integer not null,
    version             integer not null,
    claimed_at_ms       integer not null default 0
) without rowid;

insert into {schema}.runtime_leases
       (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version)
select lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version
  from {schema}.runtime_leases_being_moved
 order by attempt_id;

drop table {schema}.runtime_leases_being_moved;

create index {schema}.idx_runtime_leases_expiry on runtime_leases (lease_expires_at_ms);

-- Nobody owns it, so nobody would ever finish it.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null
 where status in ('leased', 'running')
   and not exists (select 1 from {schema}.runtime_leases as l where l.attempt_id = runtime_attempts.attempt_id);

-- Without a time it would wait for ever.
update {schema}.runtime_attempts
   set status = 'queued'
 where status = 'retry_backoff'
   and retry_at_ms is null;

-- Whatever was tried more often than the default allows has one try left, as long as that is a number.
update {schema}.runtime_attempts
   set max_attempts = min(attempt_no, 2147483646) + 1
 where attempt_no >= max_attempts;

update {schema}.runtime_attempts
   set finished_at_ms = {now_ms}
 where status in ('completed', 'failed', 'cancelled');

-- What waits: one row for each attempt that is queued or in backoff, with what a claim chooses by. A claim deletes it.
create table {schema}.runtime_queue (
    attempt_id     text not null primary key,
    queue          text not null,
    priority       integer not null,
    enqueued_at_ms integer not null,
    retry_at_ms    integer
);

insert into {schema}.runtime_queue (attempt_id, queue, priority, enqueued_at_ms, retry_at_ms)
select attempt_id, queue, priority, enqueued_at_ms, retry_at_ms
  from {schema}.runtime_attempts
 where status in ('queued', 'retry_backoff')
 order by attempt_id;

-- What has ended: a row is added for each attempt that does, and deleted with it.
create table {schema}.runtime_finished (
    finished_at_ms integer not null,
    attempt_id     text not null,
    status         text not null,
    primary key (finished_at_ms, attempt_id)
) without rowid;

insert into {schema}.runtime_finished (finished_at_ms, attempt_id, status)
select finished_at_ms, attempt_id, status
  from {schema}.runtime_attempts
 where status in ('completed', 'failed', 'cancelled');

create index {schema}.idx_runtime_queue_ready on runtime_queue (queue, priority desc, enqueued_at_ms, attempt_id)
 where retry_at_ms is null;
create index {schema}.idx_runtime_queue_due on runtime_queue (queue, retry_at_ms, attempt_id)
 where retry_at_ms is not null;
create index {schema}.idx_runtime_finished_status on runtime_finished (status, attempt_id)
 where status <> 'completed';
create index {schema}.idx_runtime_attempts_run on runtime_attempts (run_id, attempt_id);
create index {schema}.idx_runtime_jobs_status on runtime_jobs (status, thread_id);
create index {schema}.idx_runtime_interrupts_status on runtime_interrupts (status, interrupt_id);
create index {schema}.idx_runtime_interrupts_attempt on runtime_interrupts (attempt_id);
create index {schema}.idx_runtime_audit_logs_request on runtime_audit_logs (request_id, audit_id);
