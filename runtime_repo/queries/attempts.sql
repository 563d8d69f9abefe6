-- Attempts: the rows that workers compete for. Finishing writes are fenced on the attempt's own row, never through
-- leases: PostgreSQL re-checks only the row that it updates.

-- name: enqueue
-- Store an attempt, once: the same id again changes nothing and returns no row.
insert into {schema}.runtime_attempts
       (attempt_id, run_id, attempt_no, status, retry_at_ms, queue, priority, payload_json, max_attempts, enqueued_at_ms)
values ($1, $2, 1, 'queued', $3, $4, $5, $6, $7, coalesce($8, {now_ms}))
    on conflict (attempt_id) do nothing
returning {attempt};

-- name: find
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id = $1;

-- name: stored
-- What a repeated call is answered with: what it answers for may not be on any standby yet, so it waits like a write.
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id = $1
   {durably};

-- name: enqueue_many @postgres
-- Store the attempts of a JSON array ($1), each once, and return the ids of those that were not there. In the order of
-- ids, or two such calls could wait for each other.
insert into {schema}.runtime_attempts
       (attempt_id, run_id, attempt_no, status, retry_at_ms, queue, priority, payload_json, max_attempts, enqueued_at_ms)
select attempt_id, run_id, 1, 'queued', retry_at_ms, queue, priority, payload_json, max_attempts,
       coalesce($2, {now_ms})
  from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json) as given (
           attempt_id pg_catalog.text, run_id pg_catalog.text, retry_at_ms bigint, queue pg_catalog.text, priority int,
           payload_json pg_catalog.text, max_attempts int)
 order by attempt_id
    on conflict (attempt_id) do nothing
returning attempt_id;

-- name: enqueue_many @sqlite
-- As above: SQLite takes JSON apart by paths.
insert into {schema}.runtime_attempts
       (attempt_id, run_id, attempt_no, status, retry_at_ms, queue, priority, payload_json, max_attempts, enqueued_at_ms)
select json_extract(value, '$.attempt_id'), json_extract(value, '$.run_id'), 1, 'queued',
       json_extract(value, '$.retry_at_ms'), json_extract(value, '$.queue'), json_extract(value, '$.priority'),
       json_extract(value, '$.payload_json'), json_extract(value, '$.max_attempts'), coalesce($2, {now_ms})
  from json_each($1)
 where true
    on conflict (attempt_id) do nothing
returning attempt_id;

-- name: enqueue_new @postgres
-- As above, where every id was made for this very call: none can be there, and not to look for it saves a fifth. All
-- ($3) are stored, or it fails: a trigger may skip a row.
with stored as (
    insert into {schema}.runtime_attempts
           (attempt_id, run_id, attempt_no, status, retry_at_ms, queue, priority, payload_json, max_attempts,
            enqueued_at_ms)
    select attempt_id, run_id, 1, 'queued', retry_at_ms, queue, priority, payload_json, max_attempts,
           coalesce($2, {now_ms})
      from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json) as given (
               attempt_id pg_catalog.text, run_id pg_catalog.text, retry_at_ms bigint, queue pg_catalog.text,
               priority int, payload_json pg_catalog.text, max_attempts int)
    returning 1
)
select case when pg_catalog.count(*) = $3::bigint then 0
            else ('{skipped}: ' || ($3::bigint - pg_catalog.count(*))::pg_catalog.text)::bigint end as skipped
  from stored;

-- name: enqueue_new @sqlite
-- As above, in two statements of one transaction.
insert into {schema}.runtime_attempts
       (attempt_id, run_id, attempt_no, status, retry_at_ms, queue, priority, payload_json, max_attempts, enqueued_at_ms)
select json_extract(value, '$.attempt_id'), json_extract(value, '$.run_id'), 1, 'queued',
       json_extract(value, '$.retry_at_ms'), json_extract(value, '$.queue'), json_extract(value, '$.priority'),
       json_extract(value, '$.payload_json'), json_extract(value, '$.max_attempts'), coalesce($2, {now_ms})
  from json_each($1);
select json_extract('[]', case when changes() = $3 then '$' else '{skipped}' end);

-- name: stored_many @postgres
-- As stored, for the ids of a JSON array, locked in the order of ids. An array is looked up in the index; IN (SELECT)
-- can become a scan.
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id = any (array(
           select value from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json)))
 order by attempt_id
   {durably};

-- name: stored_many @sqlite
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id in (select value from json_each($1));

-- name: seen_many @postgres
-- Which of the ids of a JSON array there are, without a lock: a policy may show what it lets nobody change.
select attempt_id
  from {schema}.runtime_attempts
 where attempt_id = any (array(
           select value from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json)));

-- name: seen_many @sqlite
select attempt_id
  from {schema}.runtime_attempts
 where attempt_id in (select value from json_each($1));

-- name: list_by_run
-- One page of a run, in the order of ids, after the last id of the page before; of one status ($4) and one queue ($5)
-- if they are given.
select {attempt}
  from {schema}.runtime_attempts
 where run_id = $1
   and attempt_id > $2
   and (cast($4 as {pg_catalog}text) is null or status = $4)
   and (cast($5 as {pg_catalog}text) is null or queue = $5)
 order by attempt_id
 limit $3;

-- name: list_by_status
-- One page of a status, as above; of one queue ($4) if it is given.
select {attempt}
  from {schema}.runtime_attempts
 where status = $1
   and attempt_id > $2
   and (cast($4 as {pg_catalog}text) is null or queue = $4)
 order by attempt_id
 limit $3;

-- name: list_all
-- One page of all, as above; of one queue ($3) if it is given.
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id > $1
   and (cast($3 as {pg_catalog}text) is null or queue = $3)
 order by attempt_id
 limit $2;

-- name: list_dispatchable
-- What a claim could take, in its order: what is ready, and what is due and not yet promoted, the longest due first.
select {attempt}
  from (select {attempt}
          from {schema}.runtime_attempts
         where queue = $1
           and status = 'queued'
           and retry_at_ms is null
         order by priority desc, enqueued_at_ms, attempt_id
         limit $2) as ready
 union all
select {attempt}
  from (select {attempt}
          from {schema}.runtime_attempts
         where queue = $1
           and status in ('queued', 'retry_backoff')
           and retry_at_ms is not null
           and retry_at_ms <= coalesce($3, {now_ms})
         order by retry_at_ms, attempt_id
         limit $2) as due
 order by priority desc, enqueued_at_ms, attempt_id
 limit $2;

-- name: next @postgres
-- When something of the queues ($1, a JSON array) can be claimed: NULL is never, as things stand. For EXISTS, which
-- wants no order, PostgreSQL reads the table if much is queued anywhere, and SQLite all that is; the order leads them to
-- the queue's own.
select pg_catalog.min(case when (select attempt_id
                        from {schema}.runtime_attempts
                       where queue = named.queue
                         and status = 'queued'
                         and retry_at_ms is null
                       order by priority desc, enqueued_at_ms, attempt_id
                       limit 1) is not null
                then 0
                else (select retry_at_ms
                        from {schema}.runtime_attempts
                       where queue = named.queue
                         and status in ('queued', 'retry_backoff')
                         and retry_at_ms is not null
                       order by retry_at_ms, attempt_id
                       limit 1) end) as next_ms,
       {now_ms} as now_ms
  from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as named (queue);

-- name: next @sqlite
-- As above: each takes JSON apart in its own way.
select min(case when (select attempt_id
                        from {schema}.runtime_attempts
                       where queue = named.value
                         and status = 'queued'
                         and retry_at_ms is null
                       order by priority desc, enqueued_at_ms, attempt_id
                       limit 1) is not null
                then 0
                else (select retry_at_ms
                        from {schema}.runtime_attempts
                       where queue = named.value
                         and status in ('queued', 'retry_backoff')
                         and retry_at_ms is not null
                       order by retry_at_ms, attempt_id
                       limit 1) end) as next_ms,
       {now_ms} as now_ms
  from json_each($1) as named;

-- name: start
-- The holder has begun: remembered once for each try.
update {schema}.runtime_attempts
   set started_at_ms = case when status = 'running' and started_at_ms is not null then started_at_ms
                            else coalesce($4, {now_ms}) end,
       status        = 'running'
 where attempt_id    = $1
   and lease_version = $2
   and lease_id      = $3
   and status in ('leased', 'running')
returning {attempt};

-- name: complete @postgres
-- Finish the attempt, while it is still this token's to finish, and end its lease.
with done as (
    update {schema}.runtime_attempts
       set status         = 'completed',
           result_json    = $3,
           error          = null,
           finished_at_ms = coalesce($4, {now_ms}),
           ended_by       = 'complete'
     where attempt_id    = $1
       and lease_version = $2
       and lease_id      = $5
       and status in ('leased', 'running')
    returning {attempt}
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id in (select attempt_id from done)
)
select {attempt}
  from done;

-- name: complete @sqlite
-- As above, in two statements of one transaction: SQLite has no data-modifying common table expressions. What it
-- has ended has no lease.
update {schema}.runtime_attempts
   set status         = 'completed',
       result_json    = $3,
       error          = null,
       finished_at_ms = coalesce($4, {now_ms}),
       ended_by       = 'complete'
 where attempt_id    = $1
   and lease_version = $2
   and lease_id      = $5
   and status in ('leased', 'running')
returning {attempt};
delete from {schema}.runtime_leases
 where attempt_id in (
           select attempt_id
             from {schema}.runtime_attempts
            where attempt_id = $1
              and lease_id   = $5
              and ended_by   = 'complete');

-- name: complete_many @postgres
-- As complete, for each lease of a JSON array; returns those that were still their token's to finish. Locked in the
-- order of ids, or two such calls could wait for each other; found by an array, or PostgreSQL may look at all that is
-- leased.
with given as (
    select attempt_id, token, lease_id, result_json
      from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json) as x (
               attempt_id pg_catalog.text, token bigint, lease_id pg_catalog.text, result_json pg_catalog.text)
), locked as (
    select a.attempt_id, given.token, given.lease_id, given.result_json
      from {schema}.runtime_attempts as a
      join given on given.attempt_id = a.attempt_id and given.token = a.lease_version and given.lease_id = a.lease_id
     where a.attempt_id = any (array(select attempt_id from given))
       and a.status in ('leased', 'running')
     order by a.attempt_id
       for update of a
), done as (
    update {schema}.runtime_attempts as a
       set status         = 'completed',
           result_json    = locked.result_json,
           error          = null,
           finished_at_ms = (select coalesce($2, {now_ms})),
           ended_by       = 'complete'
      from locked
     where a.attempt_id    = locked.attempt_id
       and a.lease_version = locked.token
       and a.lease_id      = locked.lease_id
       and a.status in ('leased', 'running')
    returning a.attempt_id, a.lease_version, a.lease_id
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id = any (array(select attempt_id from done))
)
select attempt_id, lease_version, lease_id from done;

-- name: complete_many @sqlite
-- As above, in two statements of one transaction; what is completed has no lease. The plus keeps SQLite from reading all
-- that is leased or running.
update {schema}.runtime_attempts as a
   set status         = 'completed',
       result_json    = given.result_json,
       error          = null,
       finished_at_ms = coalesce($2, {now_ms}),
       ended_by       = 'complete'
  from (select json_extract(value, '$.attempt_id') as attempt_id, json_extract(value, '$.token') as token,
               json_extract(value, '$.lease_id') as lease_id, json_extract(value, '$.result_json') as result_json
          from json_each($1)) as given
 where a.attempt_id    = given.attempt_id
   and a.lease_version = given.token
   and a.lease_id      = given.lease_id
   and +a.status in ('leased', 'running')
returning attempt_id, lease_version, lease_id;
delete from {schema}.runtime_leases
 where attempt_id in (
           select a.attempt_id
             from json_each($1) as given
             join {schema}.runtime_attempts as a on a.attempt_id = json_extract(given.value, '$.attempt_id')
            where +a.status = 'completed');

-- name: fail @postgres
-- Record a failed try: try again after a delay ($4, NULL is never), unless this was the last one.
with failed as (
    update {schema}.runtime_attempts
       set status         = case when $4::bigint is null or attempt_no >= max_attempts then 'failed' else 'retry_backoff' end,
           attempt_no     = case when $4::bigint is null or attempt_no >= max_attempts then attempt_no else attempt_no + 1 end,
           retry_at_ms    = case when attempt_no >= max_attempts then null else coalesce($5, {now_ms}) + $4::bigint end,
           finished_at_ms = case when $4::bigint is null or attempt_no >= max_attempts then coalesce($5, {now_ms}) end,
           error          = $3,
           ended_by       = 'fail'
     where attempt_id    = $1
       and lease_version = $2
       and lease_id      = $6
       and status in ('leased', 'running')
    returning {attempt}
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id in (select attempt_id from failed)
)
select {attempt}
  from failed;

-- name: fail @sqlite
-- As above, in two statements of one transaction.
update {schema}.runtime_attempts
   set status         = case when $4 is null or attempt_no >= max_attempts then 'failed' else 'retry_backoff' end,
       attempt_no     = case when $4 is null or attempt_no >= max_attempts then attempt_no else attempt_no + 1 end,
       retry_at_ms    = case when attempt_no >= max_attempts then null else coalesce($5, {now_ms}) + $4 end,
       finished_at_ms = case when $4 is null or attempt_no >= max_attempts then coalesce($5, {now_ms}) end,
       error          = $3,
       ended_by       = 'fail'
 where attempt_id    = $1
   and lease_version = $2
   and lease_id      = $6
   and status in ('leased', 'running')
returning {attempt};
delete from {schema}.runtime_leases
 where attempt_id in (
           select attempt_id
             from {schema}.runtime_attempts
            where attempt_id = $1
              and lease_id   = $6
              and ended_by   = 'fail');

-- name: cancel @postgres
-- End an attempt that is not final, and its lease: the holder learns it at its next write.
with cancelled as (
    update {schema}.runtime_attempts
       set status = 'cancelled', retry_at_ms = null, finished_at_ms = coalesce($2, {now_ms}), ended_by = 'cancel'
     where attempt_id = $1
       and status in ('queued', 'leased', 'running', 'retry_backoff')
    returning {attempt}
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id in (select attempt_id from cancelled)
)
select {attempt}
  from cancelled;

-- name: cancel @sqlite
-- As above, in two statements of one transaction.
update {schema}.runtime_attempts
   set status = 'cancelled', retry_at_ms = null, finished_at_ms = coalesce($2, {now_ms}), ended_by = 'cancel'
 where attempt_id = $1
   and status in ('queued', 'leased', 'running', 'retry_backoff')
returning {attempt};
delete from {schema}.runtime_leases
 where attempt_id in (
           select attempt_id
             from {schema}.runtime_attempts
            where attempt_id = $1
              and ended_by   = 'cancel');

-- name: retry
-- Give a failed attempt one more try.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null, finished_at_ms = null, ended_by = 'retry'
 where attempt_id = $1
   and status = 'failed'
returning {attempt};

-- name: prune @postgres
-- Delete final attempts that are older than a span ($1), the oldest first, skipping what somebody is writing, and what
-- was reported and asked in them: the same id enqueued again must not find its steps done.
with pruned as (
    delete from {schema}.runtime_attempts
     where attempt_id = any (array(
               select attempt_id
                 from {schema}.runtime_attempts
                where finished_at_ms is not null
                  and finished_at_ms <= coalesce($3, {now_ms}) - $1::bigint
                order by finished_at_ms, attempt_id
                limit $2
                  for update skip locked))
    returning attempt_id
), reports as (
    delete from {schema}.runtime_step_reports
     where attempt_id = any (array(select attempt_id from pruned))
), questions as (
    delete from {schema}.runtime_interrupts
     where attempt_id = any (array(select attempt_id from pruned))
)
select attempt_id from pruned;

-- name: prune @sqlite
-- As above, in statements of one transaction. The clock moves between them, so the first one marks what goes.
update {schema}.runtime_attempts
   set finished_at_ms = -9223372036854775807
 where attempt_id in (
           select attempt_id
             from {schema}.runtime_attempts
            where finished_at_ms is not null
              and finished_at_ms <= coalesce($3, {now_ms}) - $1
            order by finished_at_ms, attempt_id
            limit $2);
delete from {schema}.runtime_step_reports
 where attempt_id in (
           select attempt_id from {schema}.runtime_attempts where finished_at_ms = -9223372036854775807);
delete from {schema}.runtime_interrupts
 where attempt_id in (
           select attempt_id from {schema}.runtime_attempts where finished_at_ms = -9223372036854775807);
delete from {schema}.runtime_attempts
 where finished_at_ms = -9223372036854775807
returning attempt_id;

-- name: stats
-- How much there is to do, queue by queue; what is due counts as ready. No time may be so early that its age is beyond
-- a bigint.
select queue,
       {pg_catalog}count(case when status in ('queued', 'retry_backoff')
                               and coalesce(retry_at_ms, 0) <= coalesce($1, {now_ms})
                              then 1 end) as ready,
       {pg_catalog}count(case when status in ('queued', 'retry_backoff')
                               and retry_at_ms > coalesce($1, {now_ms})
                              then 1 end) as delayed,
       {pg_catalog}count(case when status in ('leased', 'running') then 1 end) as leased,
       coalesce($1, {now_ms})
           - {pg_catalog}min(case when status in ('queued', 'retry_backoff')
                                   and coalesce(retry_at_ms, 0) <= coalesce($1, {now_ms})
                                  then case when enqueued_at_ms < -4611686018427387904 then -4611686018427387904
                                            else enqueued_at_ms end end) as oldest_age_ms
  from {schema}.runtime_attempts
 where status in ('queued', 'leased', 'running', 'retry_backoff')
 group by queue
 order by queue;
