-- Queues, priorities, payloads, results and fencing for attempts; answers for interrupts; roles for API keys.
-- Every NOT NULL column has a constant default: rows stay where they are and the statement stays cheap.
--
-- An attempt's row is the truth. What waits, what is held and what has ended is found by narrow tables beside it, so
-- that no column which a claim or a completion changes in it is indexed, and each page has room for the next version of
-- its rows: such an update writes to no index.

alter table {schema}.runtime_attempts
    add column queue text not null default 'default',
    add column priority integer not null default 0,
    add column payload_json text,
    add column max_attempts integer not null default 10,
    add column lease_version bigint not null default 0,
    add column worker_id text,
    add column enqueued_at_ms bigint not null default 0,
    add column started_at_ms bigint,
    add column finished_at_ms bigint,
    add column result_json text,
    add column error text,
    add column lease_id text,
    add column ended_by text,
    add column headers_json text;

-- Room for the next versions of a page's rows.
alter table {schema}.runtime_attempts set (fillfactor = 50);

alter table {schema}.runtime_leases
    add column claimed_at_ms bigint not null default 0;

-- Leases are found by their attempts: an index on each lease's own id would cost a tenth of every claim. What keeps them
-- apart so far may have any name, so the catalog says what is to be dropped.
select pg_catalog.set_config('runtime_repo.leases_keys', pg_catalog.string_agg(
           case when c.conname is null then pg_catalog.format('drop index %s', i.indexrelid::pg_catalog.regclass)
                else pg_catalog.format(
                         'alter table %s drop constraint %I', i.indrelid::pg_catalog.regclass, c.conname) end, '; '), true)
  from pg_catalog.pg_type as leases
  join pg_catalog.pg_index as i on i.indrelid operator(pg_catalog.=) leases.typrelid
  join pg_catalog.pg_attribute as a
    on a.attrelid operator(pg_catalog.=) i.indrelid
   and a.attname operator(pg_catalog.=) 'attempt_id'::pg_catalog.name
  left join pg_catalog.pg_constraint as c
    on c.conindid operator(pg_catalog.=) i.indexrelid
   and c.conrelid operator(pg_catalog.=) i.indrelid
 where leases.oid operator(pg_catalog.=) pg_catalog.pg_typeof(null::{schema}.runtime_leases)::pg_catalog.oid
   and (i.indisprimary
        or i.indisunique
           and i.indpred is null
           and i.indkey::pg_catalog.text operator(pg_catalog.=) a.attnum::pg_catalog.text);
do 'begin execute pg_catalog.current_setting(''runtime_repo.leases_keys''); end';
alter table {schema}.runtime_leases add primary key (attempt_id);

alter table {schema}.runtime_step_reports
    add column payload_json text,
    add column lease_version bigint;

alter table {schema}.runtime_interrupts
    add column resume_payload_json text,
    add column resume_payload_hash text,
    add column resumed_at_ms bigint;

alter table {schema}.runtime_api_keys
    add column role text not null default 'operator';

-- One row for each switch of the operator's.
create table {schema}.runtime_control (
    name          text not null primary key,
    value_json    text not null,
    updated_at_ms bigint not null
);

-- It would cost a third of the claims.
drop index if exists {schema}.idx_runtime_attempts_status_retry;

-- Made anew, below, with what a page is ordered by.
drop index if exists {schema}.idx_runtime_interrupts_status;
drop index if exists {schema}.idx_runtime_jobs_status;
drop index if exists {schema}.idx_runtime_audit_logs_request;

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
   set max_attempts = least(attempt_no, 2147483646) + 1
 where attempt_no >= max_attempts;

update {schema}.runtime_attempts
   set finished_at_ms = {now_ms}
 where status in ('completed', 'failed', 'cancelled');

-- What waits: one row for each attempt that is queued or in backoff, with what a claim chooses by. A claim deletes it.
create table {schema}.runtime_queue (
    attempt_id     text not null,
    queue          text not null,
    priority       integer not null,
    enqueued_at_ms bigint not null,
    retry_at_ms    bigint
);

insert into {schema}.runtime_queue (attempt_id, queue, priority, enqueued_at_ms, retry_at_ms)
select attempt_id, queue, priority, enqueued_at_ms, retry_at_ms
  from {schema}.runtime_attempts
 where status in ('queued', 'retry_backoff')
 order by attempt_id;

-- What has ended: a row is added for each attempt that does, and deleted with it.
create table {schema}.runtime_finished (
    finished_at_ms bigint not null,
    attempt_id     text not null,
    status         text not null
);

insert into {schema}.runtime_finished (finished_at_ms, attempt_id, status)
select finished_at_ms, attempt_id, status
  from {schema}.runtime_attempts
 where status in ('completed', 'failed', 'cancelled');

alter table {schema}.runtime_queue add primary key (attempt_id);
alter table {schema}.runtime_finished add primary key (finished_at_ms, attempt_id);
create index idx_runtime_queue_ready on {schema}.runtime_queue (queue, priority desc, enqueued_at_ms, attempt_id)
 where retry_at_ms is null;
create index idx_runtime_queue_due on {schema}.runtime_queue (queue, retry_at_ms, attempt_id)
 where retry_at_ms is not null;
create index idx_runtime_finished_status on {schema}.runtime_finished (status, attempt_id)
 where status <> 'completed';
create index idx_runtime_attempts_run on {schema}.runtime_attempts (run_id, attempt_id);
create index idx_runtime_jobs_status on {schema}.runtime_jobs (status, thread_id);
create index idx_runtime_interrupts_status on {schema}.runtime_interrupts (status, interrupt_id);
create index idx_runtime_interrupts_attempt on {schema}.runtime_interrupts (attempt_id);
create index idx_runtime_audit_logs_request on {schema}.runtime_audit_logs (request_id, audit_id);

-- How PostgreSQL keeps them. Every claim leaves a dead row in the narrow tables, which the next ones read past: those
-- are cleaned after so many, not after a share of a large table, and without a pause. Before that they are neither
-- vacuumed nor analyzed, and later never made shorter: a plan that was made for an almost empty file reads the table
-- from end to end, and is kept when it is large.
alter table {schema}.runtime_attempts set (
    autovacuum_vacuum_threshold = 5000, autovacuum_analyze_threshold = 5000, autovacuum_vacuum_insert_threshold = 5000);
alter table {schema}.runtime_queue set (
    vacuum_truncate = off, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_threshold = 5000, autovacuum_vacuum_insert_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
alter table {schema}.runtime_leases set (
    fillfactor = 70, vacuum_truncate = off, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_threshold = 5000, autovacuum_vacuum_insert_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
alter table {schema}.runtime_finished set (
    vacuum_truncate = off, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_threshold = 5000,
    autovacuum_vacuum_insert_threshold = 5000);
