-- Attempts: the rows that workers compete for. The attempt's own row is the truth. What waits (runtime_queue), what is
-- held (runtime_leases) and what has ended (runtime_finished) is found by narrow tables, which each statement keeps in
-- step; what is found there counts only as far as the attempt's row says the same.
-- Every statement locks what waits first, then attempts, in the order of ids, then leases. Finishing writes are fenced
-- on the attempt's own row, never through another table: PostgreSQL re-checks only the row that it updates.
-- Where PostgreSQL compares an id with the same id and nothing behind it, it is to expect few rows: each is looked up by
-- its key then, however many the planner would take them to be and however small the tables were when it made the plan.
-- And where it is asked whether there is a case for a row, it is to expect that: of a table that is almost empty it takes
-- a simple condition to leave nothing, and reads all.
-- And where rows are found by an array, a case has another that would look something up and is never so: to read all
-- looks dearer then, too. An array costs half of what it costs to look up one row after the other.
-- columns tried: attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version,
--  worker_id, enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error, ended_by, headers_json
-- columns attempt: {tried}, lease_id
-- columns new: attempt_id, run_id, attempt_no, status, retry_at_ms, queue, priority, payload_json, max_attempts,
--  headers_json, enqueued_at_ms
-- columns waiting: attempt_id, queue, priority, enqueued_at_ms, retry_at_ms
-- columns finished: finished_at_ms, attempt_id, status

-- part: replaced
-- Of what waits another row may have been left behind, by a race or by hand.
do update
       set queue = excluded.queue, priority = excluded.priority, enqueued_at_ms = excluded.enqueued_at_ms,
           retry_at_ms = excluded.retry_at_ms

-- part: waits_still
-- On PostgreSQL, whether the attempt itself waits.
case when a.status in ('queued', 'retry_backoff') then 1
                else (select null::int from {schema}.runtime_attempts as same where same.attempt_id = a.attempt_id) end
               is not null

-- part: held_still
-- Or is held.
case when a.status in ('leased', 'running') then 1
                else (select null::int from {schema}.runtime_attempts as same where same.attempt_id = a.attempt_id) end
               is not null

-- name: enqueue @postgres
-- Store an attempt, once: the same id again changes nothing and returns no row.
with stored as (
    insert into {schema}.runtime_attempts ({new})
    values ($1, $2, 1, 'queued', $3, $4, $5, $6, $7, $8, coalesce($9, {now_ms}))
        on conflict (attempt_id) do nothing
    returning {attempt}
), listed as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from stored
        on conflict (attempt_id) {replaced}
)
select {attempt}
  from stored;

-- name: enqueue @sqlite
-- As above, in two statements of one transaction: SQLite has no data-modifying common table expressions.
insert into {schema}.runtime_attempts ({new})
values ($1, $2, 1, 'queued', $3, $4, $5, $6, $7, $8, coalesce($9, {now_ms}))
    on conflict (attempt_id) do nothing
returning {attempt};
insert into {schema}.runtime_queue ({waiting})
select {waiting}
  from {schema}.runtime_attempts
 where attempt_id = $1
   and changes() > 0
    on conflict (attempt_id) {replaced};

-- name: vacuum @postgres
-- Take away the dead rows that claims and completions leave in the narrow tables, which the next ones read past. Not
-- truncated: a plan that was made for a short file reads the table from end to end. Whom PostgreSQL does not let, it only
-- warns.
vacuum (skip_locked, truncate false) {schema}.runtime_queue, {schema}.runtime_leases;

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
with stored as (
    insert into {schema}.runtime_attempts ({new})
    select attempt_id, run_id, 1, 'queued', retry_at_ms, queue, priority, payload_json, max_attempts, headers_json,
           coalesce($2, {now_ms})
      from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json) as given (
               attempt_id pg_catalog.text, run_id pg_catalog.text, retry_at_ms bigint, queue pg_catalog.text,
               priority int, payload_json pg_catalog.text, max_attempts int, headers_json pg_catalog.text)
     order by attempt_id
        on conflict (attempt_id) do nothing
    returning {waiting}
), listed as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from stored
        on conflict (attempt_id) {replaced}
)
select attempt_id from stored;

-- name: enqueue_many @sqlite
-- As above: SQLite takes JSON apart by paths. What is stored and queued already waits already.
insert into {schema}.runtime_attempts ({new})
select json_extract(value, '$.attempt_id'), json_extract(value, '$.run_id'), 1, 'queued',
       json_extract(value, '$.retry_at_ms'), json_extract(value, '$.queue'), json_extract(value, '$.priority'),
       json_extract(value, '$.payload_json'), json_extract(value, '$.max_attempts'),
       json_extract(value, '$.headers_json'), coalesce($2, {now_ms})
  from json_each($1)
 where true
    on conflict (attempt_id) do nothing
returning attempt_id;
insert into {schema}.runtime_queue ({waiting})
select {waiting_of_a}
  from json_each($1) as given
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = json_extract(given.value, '$.attempt_id')
   and a.status = 'queued'
    on conflict (attempt_id) do nothing;

-- name: enqueue_new @postgres
-- As above, where every id was made for this very call: none can be there, and not to look for it saves a fifth. All
-- ($3) are stored, or it fails: a trigger may skip a row.
with stored as (
    insert into {schema}.runtime_attempts ({new})
    select attempt_id, run_id, 1, 'queued', retry_at_ms, queue, priority, payload_json, max_attempts, headers_json,
           coalesce($2, {now_ms})
      from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json) as given (
               attempt_id pg_catalog.text, run_id pg_catalog.text, retry_at_ms bigint, queue pg_catalog.text,
               priority int, payload_json pg_catalog.text, max_attempts int, headers_json pg_catalog.text)
    returning {waiting}
), listed as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from stored
    returning 1
)
select case when pg_catalog.count(*) = $3::bigint then 0
            else ('{skipped}: ' || ($3::bigint - pg_catalog.count(*))::pg_catalog.text)::bigint end as skipped
  from listed;

-- name: enqueue_new @sqlite
-- As above, in statements of one transaction.
insert into {schema}.runtime_attempts ({new})
select json_extract(value, '$.attempt_id'), json_extract(value, '$.run_id'), 1, 'queued',
       json_extract(value, '$.retry_at_ms'), json_extract(value, '$.queue'), json_extract(value, '$.priority'),
       json_extract(value, '$.payload_json'), json_extract(value, '$.max_attempts'),
       json_extract(value, '$.headers_json'), coalesce($2, {now_ms})
  from json_each($1);
insert into {schema}.runtime_queue ({waiting})
select {waiting_of_a}
  from json_each($1) as given
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = json_extract(given.value, '$.attempt_id');
select json_extract('[]', case when changes() = $3 then '$' else '{skipped}' end);

-- name: stored_many @postgres
-- As stored, for the ids of a JSON array, locked in the order of ids.
select {attempt_of_a}
  from (select value
          from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as x (value)
         where value = value || '') as given
  join {schema}.runtime_attempts as a on a.attempt_id = given.value
 order by a.attempt_id
   for no key update of a;

-- name: stored_many @sqlite
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id in (select value from json_each($1));

-- name: seen_many @postgres
-- Which of the ids of a JSON array there are, without a lock: a policy may show what it lets nobody change.
select a.attempt_id
  from (select value
          from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as x (value)
         where value = value || '') as given
  join {schema}.runtime_attempts as a on a.attempt_id = given.value;

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

-- part: of_status
-- On PostgreSQL, the attempt itself where it has the status $1, and is of the queue $4 if that is given.
cross join lateral (
           select {attempt}
             from {schema}.runtime_attempts
            where attempt_id = here.attempt_id
              and status = $1
              and ($4::pg_catalog.text is null or queue = $4)
            limit 1) as found

-- name: list_waiting @postgres
-- One page of a status of what waits, as above; of one queue ($4) if it is given.
select {attempt_of_found}
  from {schema}.runtime_queue as here
 {of_status}
 where here.attempt_id > $2
 order by here.attempt_id
 limit $3;

-- name: list_waiting @sqlite
select {attempt_of_a}
  from {schema}.runtime_queue as w
 cross join {schema}.runtime_attempts as a
 where w.attempt_id > $2
   and a.attempt_id = w.attempt_id
   and a.status = $1
   and ($4 is null or a.queue = $4)
 order by w.attempt_id
 limit $3;

-- name: list_held @postgres
-- As above, of what is held.
select {attempt_of_found}
  from {schema}.runtime_leases as here
 {of_status}
 where here.attempt_id > $2
 order by here.attempt_id
 limit $3;

-- name: list_held @sqlite
select {attempt_of_a}
  from {schema}.runtime_leases as l
 cross join {schema}.runtime_attempts as a
 where l.attempt_id > $2
   and a.attempt_id = l.attempt_id
   and a.status = $1
   and ($4 is null or a.queue = $4)
 order by l.attempt_id
 limit $3;

-- name: list_ended @postgres
-- As above, of what has failed or was cancelled. The status is named twice, or PostgreSQL would take it for a constant
-- and drop it from the order.
select {attempt_of_found}
  from (select distinct status, attempt_id
          from {schema}.runtime_finished
         where status in ($1, $1)
           and status <> 'completed'
           and attempt_id > $2
         order by status, attempt_id) as here
 {of_status}
 order by here.status, here.attempt_id
 limit $3;

-- name: list_ended @sqlite
select {attempt_of_a}
  from (select distinct attempt_id
          from {schema}.runtime_finished
         where status = $1
           and status <> 'completed'
           and attempt_id > $2) as ended
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = ended.attempt_id
   and a.status = $1
   and ($4 is null or a.queue = $4)
 order by ended.attempt_id
 limit $3;

-- name: list_completed
-- As above, of what is completed, which most are: past those that are not.
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id > $2
   and case when status = $1 and (cast($4 as {pg_catalog}text) is null or queue = $4) then 1 end is not null
 order by attempt_id
 limit $3;

-- name: list_all
-- One page of all, as above; of one queue ($3) if it is given.
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id > $1
   and case when cast($3 as {pg_catalog}text) is null or queue = $3 then 1 end is not null
 order by attempt_id
 limit $2;

-- name: list_dispatchable 100 10000 2147483647 @postgres
-- What a claim could take, in its order: what is ready, and what is due and not yet promoted, the longest due first;
-- nothing where nobody may claim.
select {attempt_of_found}
  from (select attempt_id
          from (select attempt_id
                  from {schema}.runtime_queue
                 where queue = $1
                   and retry_at_ms is null
                 order by priority desc, enqueued_at_ms, attempt_id
                 limit {most}) as first
         limit $2) as ready
 cross join lateral (
           select {attempt}
             from {schema}.runtime_attempts
            where attempt_id = ready.attempt_id
              and status in ('queued', 'retry_backoff')
            limit 1) as found
 union all
select {attempt_of_found}
  from (select attempt_id
          from (select attempt_id
                  from {schema}.runtime_queue
                 where queue = $1
                   and retry_at_ms is not null
                   and retry_at_ms <= coalesce($3, {now_ms})
                 order by retry_at_ms, attempt_id
                 limit {most}) as first
         limit $2) as due
 cross join lateral (
           select {attempt}
             from {schema}.runtime_attempts
            where attempt_id = due.attempt_id
              and status in ('queued', 'retry_backoff')
            limit 1) as found
 order by priority desc, enqueued_at_ms, attempt_id
 limit case when (select 1 from (select $1::pg_catalog.text as value) as named where {is_open}) is not null
            then $2 else 0 end;

-- name: list_dispatchable 100 10000 2147483647 @sqlite
select {attempt_of_a}
  from (select attempt_id
          from (select attempt_id
                  from {schema}.runtime_queue
                 where queue = $1
                   and retry_at_ms is null
                 order by priority desc, enqueued_at_ms, attempt_id
                 limit $2)
         union all
        select attempt_id
          from (select attempt_id
                  from {schema}.runtime_queue
                 where queue = $1
                   and retry_at_ms is not null
                   and retry_at_ms <= coalesce($3, {now_ms})
                 order by retry_at_ms, attempt_id
                 limit $2)) as w
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = w.attempt_id
   and a.status in ('queued', 'retry_backoff')
 order by a.priority desc, a.enqueued_at_ms, a.attempt_id
 limit case when (select 1 from (select $1 as value) as named where {is_open}) is not null then $2 else 0 end;

-- name: next @postgres
-- When something of the queues ($1, a JSON array) can be claimed: NULL is never, as things stand. For EXISTS, which
-- wants no order, PostgreSQL reads the table if much is queued anywhere, and SQLite all that is; the order leads them to
-- the queue's own. Where nobody may claim it is never, but at once for the release that is to learn that it is outdated.
select pg_catalog.min(case when {is_outdated} then 0
                when {is_stopped} then null
                when (select attempt_id
                        from {schema}.runtime_queue
                       where queue = named.value
                         and retry_at_ms is null
                       order by priority desc, enqueued_at_ms, attempt_id
                       limit 1) is not null
                then 0
                else (select retry_at_ms
                        from {schema}.runtime_queue
                       where queue = named.value
                         and retry_at_ms is not null
                       order by retry_at_ms, attempt_id
                       limit 1) end) as next_ms,
       {now_ms} as now_ms,
       (select 1 from {schema}.runtime_control where name = 'quiesce') is not null as is_quiesced
  from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as named (value);

-- name: next @sqlite
-- As above: each takes JSON apart in its own way.
select min(case when {is_outdated} then 0
                when {is_stopped} then null
                when (select attempt_id
                        from {schema}.runtime_queue
                       where queue = named.value
                         and retry_at_ms is null
                       order by priority desc, enqueued_at_ms, attempt_id
                       limit 1) is not null
                then 0
                else (select retry_at_ms
                        from {schema}.runtime_queue
                       where queue = named.value
                         and retry_at_ms is not null
                       order by retry_at_ms, attempt_id
                       limit 1) end) as next_ms,
       {now_ms} as now_ms,
       (select 1 from {schema}.runtime_control where name = 'quiesce') is not null as is_quiesced
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
     where attempt_id = (select attempt_id from done)
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from done
)
select {attempt}
  from done;

-- name: complete @sqlite
-- As above, in statements of one transaction. To return what it has written takes SQLite longer than to read it, by which
-- a repetition is answered as well.
update {schema}.runtime_attempts
   set status         = 'completed',
       result_json    = $3,
       error          = null,
       finished_at_ms = coalesce($4, {now_ms}),
       ended_by       = 'complete'
 where attempt_id    = $1
   and lease_version = $2
   and lease_id      = $5
   and status in ('leased', 'running');
insert or replace into {schema}.runtime_finished ({finished})
select {finished}
  from {schema}.runtime_attempts
 where attempt_id = $1
   and changes() > 0;
delete from {schema}.runtime_leases
 where attempt_id = $1
   and changes() > 0;
select {attempt}
  from {schema}.runtime_attempts
 where attempt_id    = $1
   and lease_version = $2
   and lease_id      = $5
   and ended_by      = 'complete';

-- part: results_given
-- On PostgreSQL, the leases and results of an array ($1) of four columns, one behind the other.
select attempt_id, token::bigint as token, lease_id, result_json
      from (select $1::pg_catalog.text[] as cells, pg_catalog.cardinality($1::pg_catalog.text[]) / 4 as height) as columns
     cross join lateral rows from (
               pg_catalog.unnest(cells[:height]), pg_catalog.unnest(cells[height + 1:2 * height]),
               pg_catalog.unnest(cells[2 * height + 1:3 * height]), pg_catalog.unnest(cells[3 * height + 1:]))
               as x (attempt_id, token, lease_id, result_json)

-- name: complete_many @postgres
-- As complete, for each lease of an array ($1) of four columns, one behind the other; returns those that were still their
-- token's to finish or, if all were, one row without an id. One after the other in the order of ids, or two such calls
-- could wait for each other. The attempts and the leases are found by arrays: joined, they would be compared one by one
-- with all that is given or done, where a vacuum has found their tables empty.
with given as materialized (
    {results_given}
     order by attempt_id
), done as (
    update {schema}.runtime_attempts as a
       set status         = 'completed',
           result_json    = given.result_json,
           error          = null,
           finished_at_ms = coalesce($2, {now_ms}),
           ended_by       = 'complete'
      from given
     where a.attempt_id = any (array(select attempt_id from given))
       and {held_still}
       and a.attempt_id = given.attempt_id
       and case when a.lease_version = given.token and a.lease_id = given.lease_id then 1
                else (select null::int from {schema}.runtime_attempts as same where same.attempt_id = a.attempt_id) end
               is not null
    returning a.finished_at_ms, a.attempt_id, a.status, a.lease_version, a.lease_id
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id = any (array(select attempt_id from done))
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from done
)
select attempt_id, lease_version, lease_id
  from done
 where (select pg_catalog.count(*) from done) < (select pg_catalog.count(*) from given)
 union all
select null, null, null
 where (select pg_catalog.count(*) from done) = (select pg_catalog.count(*) from given);

-- name: complete_many @sqlite
-- As above, in statements of one transaction, of the places ($3) of those that are still their token's to finish: in one
-- way if there is any result ($4), and in half the time if there is none ($5). They are named if they are not all ($6, $7).
select places as "$3", case when has_results then places end as "$4", case when not has_results then places end as "$5"
  from (select nullif(json_group_array(a.rowid), '[]') as places,
               max(json_type(given.value, '$.result_json') <> 'null') as has_results
          from json_each($1) as given
         cross join {schema}.runtime_attempts as a
         where a.attempt_id    = json_extract(given.value, '$.attempt_id')
           and a.lease_version = json_extract(given.value, '$.token')
           and a.lease_id      = json_extract(given.value, '$.lease_id')
           and a.status in ('leased', 'running')) as found;
update {schema}.runtime_attempts as a
   set status         = 'completed',
       result_json    = given.result_json,
       error          = null,
       finished_at_ms = coalesce($2, {now_ms}),
       ended_by       = 'complete'
  from (select json_extract(value, '$.attempt_id') as attempt_id, json_extract(value, '$.token') as token,
               json_extract(value, '$.lease_id') as lease_id, json_extract(value, '$.result_json') as result_json
          from json_each($1)) as given
 where $4 is not null
   and a.attempt_id    = given.attempt_id
   and a.lease_version = given.token
   and a.lease_id      = given.lease_id
   and a.status in ('leased', 'running');
update {schema}.runtime_attempts
   set status         = 'completed',
       result_json    = null,
       error          = null,
       finished_at_ms = coalesce($2, {now_ms}),
       ended_by       = 'complete'
 where rowid in (select value from json_each($5));
insert or replace into {schema}.runtime_finished ({finished})
select {finished_of_a}
  from json_each($3) as given
 cross join {schema}.runtime_attempts as a
 where a.rowid  = given.value
   and a.status = 'completed';
delete from {schema}.runtime_leases
 where attempt_id in (
           select a.attempt_id
             from json_each($3) as given
            cross join {schema}.runtime_attempts as a
            where a.rowid  = given.value
              and a.status = 'completed');
select case when count(*) < json_array_length($1) then $3 end as "$6",
       case when count(*) = json_array_length($1) then 1 end as "$7"
  from json_each($3) as given
 cross join {schema}.runtime_attempts as a
 where a.rowid  = given.value
   and a.status = 'completed';
select a.attempt_id, a.lease_version, a.lease_id
  from json_each($6) as given
 cross join {schema}.runtime_attempts as a
 where a.rowid  = given.value
   and a.status = 'completed';
select null as attempt_id, null as lease_version, null as lease_id
 where $7 = 1;

-- name: complete_shared @postgres
-- As complete, for each lease of such an array; returns what was completed. A row that somebody has locked is left alone:
-- whoever asked for that one asks again by himself, and the others do not wait for it.
with given as materialized (
    {results_given}
     where attempt_id = attempt_id || ''
       and attempt_id || '' = attempt_id
     order by attempt_id
), locked as materialized (
    select a.attempt_id, given.token, given.lease_id, given.result_json
      from given
      join {schema}.runtime_attempts as a on a.attempt_id = given.attempt_id
     where a.lease_version = given.token
       and a.lease_id      = given.lease_id
       and case when a.status in ('leased', 'running') then 1 end is not null
     order by a.attempt_id
       for update of a skip locked
), done as (
    update {schema}.runtime_attempts as a
       set status         = 'completed',
           result_json    = locked.result_json,
           error          = null,
           finished_at_ms = coalesce($2, {now_ms}),
           ended_by       = 'complete'
      from locked
     where a.attempt_id    = locked.attempt_id
       and a.lease_version = locked.token
       and a.lease_id      = locked.lease_id
       and case when a.status in ('leased', 'running') then 1 end is not null
    returning {attempt_of_a}
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id = any (array(select attempt_id from done))
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from done
)
select {attempt}
  from done;

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
     where attempt_id = (select attempt_id from failed)
), queued as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from failed where status = 'retry_backoff'
        on conflict (attempt_id) {replaced}
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from failed where status = 'failed'
        on conflict do nothing
)
select {attempt}
  from failed;

-- name: fail @sqlite
-- As above, in statements of one transaction.
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
 where attempt_id = $1
   and changes() > 0;
insert into {schema}.runtime_queue ({waiting})
select {waiting}
  from {schema}.runtime_attempts
 where attempt_id = $1
   and lease_id   = $6
   and status     = 'retry_backoff'
   and ended_by   = 'fail'
    on conflict (attempt_id) {replaced};
insert or replace into {schema}.runtime_finished ({finished})
select {finished}
  from {schema}.runtime_attempts
 where attempt_id = $1
   and lease_id   = $6
   and status     = 'failed'
   and ended_by   = 'fail';

-- name: cancel @postgres
-- End an attempt that is not final, and its lease: the holder learns it at its next write. What waits is locked first,
-- as by a claim; the array sees to that. What waits and could be cancelled is, or all of it fails: a trigger that skips
-- the attempt would leave it waiting where nothing finds it.
with waiting as (
    delete from {schema}.runtime_queue
     where attempt_id = $1
    returning attempt_id
), cancelled as (
    update {schema}.runtime_attempts
       set status = 'cancelled', retry_at_ms = null, finished_at_ms = coalesce($2, {now_ms}), ended_by = 'cancel'
     where attempt_id = $1
       and status in ('queued', 'leased', 'running', 'retry_backoff')
       and array(select attempt_id from waiting) is not null
    returning {attempt}
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id = (select attempt_id from cancelled)
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from cancelled
        on conflict do nothing
)
select {attempt}
  from cancelled
 limit case when (select pg_catalog.count(*) from cancelled) < (select pg_catalog.count(*) from waiting)
                 and exists (
                         select 1
                           from {schema}.runtime_attempts
                          where attempt_id = $1
                            and status in ('queued', 'leased', 'running', 'retry_backoff'))
            then ('{skipped}: ' || (select pg_catalog.count(*) from waiting)::pg_catalog.text)::bigint end;

-- name: cancel @sqlite
-- As above, in statements of one transaction.
update {schema}.runtime_attempts
   set status = 'cancelled', retry_at_ms = null, finished_at_ms = coalesce($2, {now_ms}), ended_by = 'cancel'
 where attempt_id = $1
   and status in ('queued', 'leased', 'running', 'retry_backoff')
returning {attempt};
insert or replace into {schema}.runtime_finished ({finished})
select {finished}
  from {schema}.runtime_attempts
 where attempt_id = $1
   and changes() > 0;
delete from {schema}.runtime_queue
 where attempt_id in (
           select attempt_id
             from {schema}.runtime_attempts
            where attempt_id = $1
              and ended_by   = 'cancel');
delete from {schema}.runtime_leases
 where attempt_id in (
           select attempt_id
             from {schema}.runtime_attempts
            where attempt_id = $1
              and ended_by   = 'cancel');

-- name: retry @postgres
-- Give a failed attempt one more try.
with again as (
    update {schema}.runtime_attempts
       set status = 'queued', retry_at_ms = null, finished_at_ms = null, ended_by = 'retry'
     where attempt_id = $1
       and status = 'failed'
    returning {attempt}
), listed as (
    delete from {schema}.runtime_finished
     where status <> 'completed'
       and status = 'failed'
       and attempt_id = (select attempt_id from again)
), queued as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from again
        on conflict (attempt_id) {replaced}
)
select {attempt}
  from again;

-- name: retry @sqlite
-- As above, in statements of one transaction.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null, finished_at_ms = null, ended_by = 'retry'
 where attempt_id = $1
   and status = 'failed'
returning {attempt};
insert into {schema}.runtime_queue ({waiting})
select {waiting}
  from {schema}.runtime_attempts
 where attempt_id = $1
   and changes() > 0
    on conflict (attempt_id) {replaced};
delete from {schema}.runtime_finished
 where status <> 'completed'
   and status = 'failed'
   and attempt_id = $1
   and changes() > 0;

-- part: pruned_with_all
-- On PostgreSQL, delete what is locked, and of what is old whatever says that it ended then and is no longer so.
), pruned as (
    delete from {schema}.runtime_attempts as a
     using locked
     where a.attempt_id = locked.attempt_id
    returning a.attempt_id
), listed as (
    delete from {schema}.runtime_finished as f
     using old
     where f.finished_at_ms = old.finished_at_ms
       and f.attempt_id     = old.attempt_id
       and (f.attempt_id = any (array(select attempt_id from pruned))
            or (select a.finished_at_ms
                  from {schema}.runtime_attempts as a
                 where a.attempt_id = f.attempt_id
                   and a.status in ('completed', 'failed', 'cancelled')) is distinct from f.finished_at_ms)
), waiting as (
    delete from {schema}.runtime_queue as w
     using pruned
     where w.attempt_id = pruned.attempt_id
), leases as (
    delete from {schema}.runtime_leases as l
     using pruned
     where l.attempt_id = pruned.attempt_id
), reports as (
    delete from {schema}.runtime_step_reports as r
     using pruned
     where r.attempt_id = pruned.attempt_id
), questions as (
    delete from {schema}.runtime_interrupts as i
     using pruned
     where i.attempt_id = pruned.attempt_id
)
select attempt_id from pruned;

-- part: pruned
-- On SQLite, what is marked and is gone.
           select f.attempt_id
             from {schema}.runtime_finished as f
            where f.finished_at_ms = -9223372036854775807
              and not exists (select 1 from {schema}.runtime_attempts as a where a.attempt_id = f.attempt_id)

-- part: marked_are_deleted
-- On SQLite, delete what is marked as the oldest of all. Nothing is marked on the attempts themselves, for a trigger of
-- the operator's may keep one: what it kept is unmarked.
delete from {schema}.runtime_attempts
 where attempt_id in (
           select attempt_id from {schema}.runtime_finished where finished_at_ms = -9223372036854775807)
   and +status in ('completed', 'failed', 'cancelled')
   and finished_at_ms <= coalesce($3, {now_ms}) - $1
returning attempt_id;
update or replace {schema}.runtime_finished
   set (finished_at_ms, status) = (
           select a.finished_at_ms, a.status
             from {schema}.runtime_attempts as a
            where a.attempt_id = runtime_finished.attempt_id)
 where finished_at_ms = -9223372036854775807
   and (select a.finished_at_ms
          from {schema}.runtime_attempts as a
         where a.attempt_id = runtime_finished.attempt_id
           and a.status in ('completed', 'failed', 'cancelled')) is not null;
delete from {schema}.runtime_step_reports
 where attempt_id in ({pruned});
delete from {schema}.runtime_interrupts
 where attempt_id in ({pruned});
delete from {schema}.runtime_queue
 where attempt_id in ({pruned});
delete from {schema}.runtime_leases
 where attempt_id in ({pruned});
delete from {schema}.runtime_finished
 where finished_at_ms = -9223372036854775807;

-- name: prune 1000 100000 2147483647 @postgres
-- Delete final attempts that are older than a span ($1), the oldest first, skipping what somebody is writing, and what
-- was reported and asked in them: the same id enqueued again must not find its steps done. What says of an attempt that
-- it ended then, and that is no longer so, goes as well, and whatever a race has left behind of those that go.
with old as (
    select finished_at_ms, attempt_id
      from (select finished_at_ms, attempt_id
              from (select finished_at_ms, attempt_id
                      from {schema}.runtime_finished
                     where finished_at_ms <= coalesce($3, {now_ms}) - $1::bigint
                     order by finished_at_ms, attempt_id
                     limit {most}) as first
             limit $2) as first
     where attempt_id = attempt_id || ''
       and attempt_id || '' = attempt_id
), locked as (
    select a.attempt_id
      from old
      join {schema}.runtime_attempts as a on a.attempt_id = old.attempt_id
     where case when a.status in ('completed', 'failed', 'cancelled') then 1 end is not null
       and case when a.finished_at_ms <= coalesce($3, {now_ms}) - $1::bigint then 1 end is not null
     order by a.attempt_id
       for update of a skip locked
{pruned_with_all}

-- name: prune 1000 100000 2147483647 @sqlite
-- As above, in statements of one transaction. The clock moves between them, so the first ones mark what goes.
update or replace {schema}.runtime_finished
   set finished_at_ms = -9223372036854775807
 where (finished_at_ms, attempt_id) in (
           select finished_at_ms, attempt_id
             from {schema}.runtime_finished
            where finished_at_ms <= coalesce($3, {now_ms}) - $1
            order by finished_at_ms, attempt_id
            limit $2);
{marked_are_deleted}

-- part: fits
-- Whether an attempt is among those that an operator means: of a status ($2), of a queue ($3), with words in its error
-- ($4), and of an age ($5) since it ended, or was enqueued if it has not, as far as they are given.
(cast($2 as {pg_catalog}text) is null or a.status = $2)
                    and (cast($3 as {pg_catalog}text) is null or a.queue = $3)
                    and (cast($4 as {pg_catalog}text) is null or {pg_catalog}replace(a.error, $4, '') <> a.error)
                    and (cast($5 as bigint) is null
                         or coalesce(a.finished_at_ms, a.enqueued_at_ms) <= coalesce($6, {now_ms}) - cast($5 as bigint))

-- name: sift_waiting 1000
-- Of the next attempts ($7) behind an id ($1) that wait, which of them fit. Nothing is locked.
select here.attempt_id,
       (select case when a.status in ('queued', 'retry_backoff')
                    and {fits} then 1 end
          from {schema}.runtime_attempts as a
         where a.attempt_id = here.attempt_id) as fits
  from (select attempt_id
          from (select attempt_id
                  from {schema}.runtime_queue
                 where attempt_id > $1
                 order by attempt_id
                 limit {most}) as first
         limit $7) as here
 order by here.attempt_id;

-- name: sift_held 1000
-- As above, of those that are held.
select here.attempt_id,
       (select case when a.status in ('leased', 'running')
                    and {fits} then 1 end
          from {schema}.runtime_attempts as a
         where a.attempt_id = here.attempt_id) as fits
  from (select attempt_id
          from (select attempt_id
                  from {schema}.runtime_leases
                 where attempt_id > $1
                 order by attempt_id
                 limit {most}) as first
         limit $7) as here
 order by here.attempt_id;

-- name: sift_ended 1000
-- As above, of those that have ended in a status ($2) which is not completed. For its being named twice see list_ended.
select here.attempt_id,
       (select case when {fits} then 1 end
          from {schema}.runtime_attempts as a
         where a.attempt_id = here.attempt_id) as fits
  from (select attempt_id
          from (select distinct status, attempt_id
                  from {schema}.runtime_finished
                 where status in ($2, $2)
                   and status <> 'completed'
                   and attempt_id > $1
                 order by status, attempt_id
                 limit {most}) as first
         limit $7) as here
 order by here.attempt_id;

-- name: sift_old 1000
-- As above, of those that ended so long ago ($5), the oldest first, behind a place ($8, $1).
select here.finished_at_ms, here.attempt_id,
       (select case when a.status in ('completed', 'failed', 'cancelled')
                     and a.finished_at_ms = here.finished_at_ms
                     and {fits} then 1 end
          from {schema}.runtime_attempts as a
         where a.attempt_id = here.attempt_id) as fits
  from (select finished_at_ms, attempt_id
          from (select finished_at_ms, attempt_id
                  from {schema}.runtime_finished
                 where (finished_at_ms, attempt_id) > ($8, $1)
                   and finished_at_ms <= coalesce($6, {now_ms}) - cast($5 as bigint)
                 order by finished_at_ms, attempt_id
                 limit {most}) as first
         limit $7) as here
 order by here.finished_at_ms, here.attempt_id;

-- name: retry_many @postgres
-- As retry, for each of a JSON array ($1) of ids that still fits; returns their queues.
with given as (
    select value as attempt_id
      from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as x (value)
     where value = value || ''
), locked as (
    select a.attempt_id
      from given
      join {schema}.runtime_attempts as a on a.attempt_id = given.attempt_id
     where case when a.status = 'failed'
                    and {fits} then 1 end is not null
     order by a.attempt_id
       for no key update of a
), again as (
    update {schema}.runtime_attempts as a
       set status = 'queued', retry_at_ms = null, finished_at_ms = null, ended_by = 'retry'
      from locked
     where a.attempt_id = locked.attempt_id
    returning {waiting_of_a}
), listed as (
    delete from {schema}.runtime_finished
     where status <> 'completed'
       and status = 'failed'
       and attempt_id = any (array(select attempt_id from again))
), queued as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from again
        on conflict (attempt_id) {replaced}
)
select queue from again;

-- name: retry_many @sqlite
-- As above, in statements of one transaction; the failed ones that did not fit are failed still.
update {schema}.runtime_attempts as a
   set status = 'queued', retry_at_ms = null, finished_at_ms = null, ended_by = 'retry'
 where a.attempt_id in (select value from json_each($1))
   and a.status = 'failed'
   and {fits}
returning queue;
insert into {schema}.runtime_queue ({waiting})
select {waiting}
  from {schema}.runtime_attempts
 where attempt_id in (select value from json_each($1))
   and status   = 'queued'
   and ended_by = 'retry'
    on conflict (attempt_id) {replaced};
delete from {schema}.runtime_finished
 where status <> 'completed'
   and status = 'failed'
   and attempt_id in (
           select a.attempt_id
             from json_each($1) as given
            cross join {schema}.runtime_attempts as a
            where a.attempt_id = given.value
              and a.status     = 'queued');

-- name: cancel_many @postgres
-- As cancel, for each of a JSON array ($1) of ids that still fits.
with {given_and_waiting}, locked as (
    select a.attempt_id
      from given
      join {schema}.runtime_attempts as a on a.attempt_id = given.attempt_id
     where array(select attempt_id from waiting) is not null
       and case when a.status in ('queued', 'leased', 'running', 'retry_backoff')
                    and {fits} then 1 end is not null
     order by a.attempt_id
       for no key update of a
), cancelled as (
    update {schema}.runtime_attempts as a
       set status = 'cancelled', retry_at_ms = null, finished_at_ms = coalesce($6, {now_ms}), ended_by = 'cancel'
      from locked
     where a.attempt_id = locked.attempt_id
    returning {finished_of_a}, a.queue
), unqueued as (
    delete from {schema}.runtime_queue
     where attempt_id = any (array(select attempt_id from cancelled))
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id = any (array(select attempt_id from cancelled))
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from cancelled
        on conflict do nothing
)
select queue from cancelled;

-- name: cancel_many @sqlite
-- As above, in statements of one transaction; what is cancelled neither waits nor is held.
update {schema}.runtime_attempts as a
   set status = 'cancelled', retry_at_ms = null, finished_at_ms = coalesce($6, {now_ms}), ended_by = 'cancel'
 where a.attempt_id in (select value from json_each($1))
   and a.status in ('queued', 'leased', 'running', 'retry_backoff')
   and {fits}
returning queue;
insert or replace into {schema}.runtime_finished ({finished})
select {finished_of_a}
  from json_each($1) as given
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = given.value
   and a.status     = 'cancelled';
delete from {schema}.runtime_queue
 where attempt_id in (
           select a.attempt_id
             from json_each($1) as given
            cross join {schema}.runtime_attempts as a
            where a.attempt_id = given.value
              and a.status     = 'cancelled');
delete from {schema}.runtime_leases
 where attempt_id in (
           select a.attempt_id
             from json_each($1) as given
            cross join {schema}.runtime_attempts as a
            where a.attempt_id = given.value
              and a.status     = 'cancelled');

-- name: prune_many @postgres
-- As prune, of the ends that a JSON array ($2) tells, each a time and an id, as far as they are still so. On SQLite
-- nobody writes between the look and this.
with old as (
    select finished_at_ms, attempt_id
      from pg_catalog.json_to_recordset($2::pg_catalog.text::pg_catalog.json) as x (
               finished_at_ms bigint, attempt_id pg_catalog.text)
     where attempt_id = attempt_id || ''
       and attempt_id || '' = attempt_id
), locked as (
    select a.attempt_id
      from old
      join {schema}.runtime_attempts as a on a.attempt_id = old.attempt_id
     where case when a.status in ('completed', 'failed', 'cancelled') then 1 end is not null
       and case when a.finished_at_ms = old.finished_at_ms
                    and a.finished_at_ms <= coalesce($3, {now_ms}) - $1::bigint then 1 end is not null
     order by a.attempt_id
       for update of a skip locked
{pruned_with_all}

-- name: prune_many @sqlite
update or replace {schema}.runtime_finished
   set finished_at_ms = -9223372036854775807
 where (finished_at_ms, attempt_id) in (
           select json_extract(value, '$.finished_at_ms'), json_extract(value, '$.attempt_id')
             from json_each($2));
{marked_are_deleted}

-- name: depth @postgres
-- How much of a queue ($1) could be claimed now, counted no further than so many ($2): one read of each of the queue's
-- two indexes, to which the order leads.
select (select pg_catalog.count(*)
          from (select 1
                  from (select 1
                          from {schema}.runtime_queue
                         where queue = $1
                           and retry_at_ms is null
                         order by priority desc, enqueued_at_ms, attempt_id
                         limit 100000) as first
                 limit $2) as ready) as ready,
       (select pg_catalog.count(*)
          from (select 1
                  from (select 1
                          from {schema}.runtime_queue
                         where queue = $1
                           and retry_at_ms is not null
                           and retry_at_ms <= coalesce($3, {now_ms})
                         order by retry_at_ms, attempt_id
                         limit 100000) as first
                 limit $2) as due) as due;

-- name: depth @sqlite
select (select count(*)
          from (select 1
                  from {schema}.runtime_queue
                 where queue = $1
                   and retry_at_ms is null
                 order by priority desc, enqueued_at_ms, attempt_id
                 limit $2) as first) as ready,
       (select count(*)
          from (select 1
                  from {schema}.runtime_queue
                 where queue = $1
                   and retry_at_ms is not null
                   and retry_at_ms <= coalesce($3, {now_ms})
                 order by retry_at_ms, attempt_id
                 limit $2) as first) as due;

-- name: stats
-- How much there is to do, queue by queue; what is due counts as ready. No time may be so early that its age is beyond
-- a bigint.
select queue, {pg_catalog}count(case when kind = 'ready' then 1 end) as ready,
       {pg_catalog}count(case when kind = 'delayed' then 1 end) as delayed,
       {pg_catalog}count(case when kind = 'leased' then 1 end) as leased,
       coalesce($1, {now_ms})
           - {pg_catalog}min(case when enqueued_at_ms < -4611686018427387904 then -4611686018427387904
                                  else enqueued_at_ms end) as oldest_age_ms
  from (select queue, case when coalesce(retry_at_ms, 0) <= coalesce($1, {now_ms}) then 'ready'
                           when retry_at_ms > coalesce($1, {now_ms}) then 'delayed' end as kind,
               case when coalesce(retry_at_ms, 0) <= coalesce($1, {now_ms}) then enqueued_at_ms end as enqueued_at_ms
          from {schema}.runtime_queue
         union all
        select (select a.queue
                  from {schema}.runtime_attempts as a
                 where a.attempt_id = l.attempt_id
                   and a.status in ('leased', 'running')) as queue, 'leased' as kind, null as enqueued_at_ms
          from {schema}.runtime_leases as l) as found
 where queue is not null
 group by queue
 order by queue;

-- name: look_through 1000
-- Of the next attempts ($2) behind a place ($1) those that the narrow tables do not have as they are, each with what it
-- is to be found under; and the last one of all, as '', if there are any.
select place, attempt_id, kind
  from (select here.place, here.attempt_id,
               case when here.status in ('queued', 'retry_backoff')
                         and (select 1
                                from {schema}.runtime_queue as w
                               where w.attempt_id     = here.attempt_id
                                 and w.queue          = here.queue
                                 and w.priority       = here.priority
                                 and w.enqueued_at_ms = here.enqueued_at_ms
                                 and coalesce(w.retry_at_ms, -1) = coalesce(here.retry_at_ms, -1)) is null
                    then 'waiting'
                    when here.status in ('leased', 'running')
                         and (select 1 from {schema}.runtime_leases as l where l.attempt_id = here.attempt_id) is null
                    then 'held'
                    when here.status in ('completed', 'failed', 'cancelled')
                         and (select 1
                                from {schema}.runtime_finished as f
                               where f.finished_at_ms = here.finished_at_ms
                                 and f.attempt_id     = here.attempt_id
                                 and f.status         = here.status) is null
                    then 'finished' end as kind
          from (select place, attempt_id, status, queue, priority, enqueued_at_ms, retry_at_ms, finished_at_ms
                  from (select {place} as place, attempt_id, status, queue, priority, enqueued_at_ms, retry_at_ms,
                               finished_at_ms
                          from {schema}.runtime_attempts
                         where {place} > coalesce($1, {before_all})
                         order by {place}
                         limit {most}) as first
                  limit $2) as here) as seen
 where kind is not null
 union all
select place, attempt_id, kind
  from (select place, attempt_id, '' as kind
          from (select place, attempt_id
                  from (select {place} as place, attempt_id
                          from {schema}.runtime_attempts
                         where {place} > coalesce($1, {before_all})
                         order by {place}
                         limit {most}) as first
                  limit $2) as here
         order by place desc
         limit 1) as last;

-- name: look_through_queue 1000
-- Of the next rows ($2) behind a place ($1) of what waits those whose attempt does not; and the last one of all, as ''.
select place, attempt_id, kind
  from (select here.place, here.attempt_id,
               case when (select a.status
                            from {schema}.runtime_attempts as a
                           where a.attempt_id = here.attempt_id) in ('queued', 'retry_backoff')
                    then null else 'waiting' end as kind
          from (select place, attempt_id
                  from (select {place} as place, attempt_id
                          from {schema}.runtime_queue
                         where {place} > coalesce($1, {before_all})
                         order by {place}
                         limit {most}) as first
                  limit $2) as here) as seen
 where kind is not null
 union all
select place, attempt_id, kind
  from (select place, attempt_id, '' as kind
          from (select place, attempt_id
                  from (select {place} as place, attempt_id
                          from {schema}.runtime_queue
                         where {place} > coalesce($1, {before_all})
                         order by {place}
                         limit {most}) as first
                  limit $2) as here
         order by place desc
         limit 1) as last;

-- part: given_and_waiting
-- On PostgreSQL, the attempts of a JSON array ($1) of places, and what waits of them, locked in the order of ids.
given as (
    select value as attempt_id
      from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as x (value)
     where value = value || ''
), waiting as (
    select w.attempt_id
      from given
      join {schema}.runtime_queue as w on w.attempt_id = given.attempt_id
     order by w.attempt_id
       for update of w
)

-- name: mend @postgres
-- Let the attempts of a JSON array ($1) of places be found as what their rows say that they are. They are locked, as what
-- waits is before them, so that nothing is written of what is no longer so.
with {given_and_waiting}, truth as (
    select {waiting_of_a}, a.status, a.finished_at_ms
      from given
      join {schema}.runtime_attempts as a on a.attempt_id = given.attempt_id
     where array(select attempt_id from waiting) is not null
     order by a.attempt_id
       for no key update of a
), queued as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from truth where status in ('queued', 'retry_backoff')
        on conflict (attempt_id) {replaced}
), unqueued as (
    delete from {schema}.runtime_queue as w
     using waiting
     where w.attempt_id = waiting.attempt_id
       and not exists (select 1 from truth
                        where truth.attempt_id = w.attempt_id and truth.status in ('queued', 'retry_backoff'))
), dated as (
    update {schema}.runtime_attempts as a
       set finished_at_ms = {now_ms}
      from truth
     where a.attempt_id = truth.attempt_id
       and truth.finished_at_ms is null
       and case when a.status in ('completed', 'failed', 'cancelled') then 1 end is not null
    returning a.finished_at_ms, a.attempt_id, a.status
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from truth where status in ('completed', 'failed', 'cancelled') and finished_at_ms is not null
     union all
    select {finished} from dated
        on conflict (finished_at_ms, attempt_id) do update set status = excluded.status
)
select attempt_id from given;

-- name: mend @sqlite
-- As above, in statements of one transaction.
update {schema}.runtime_attempts
   set finished_at_ms = {now_ms}
 where rowid in (select value from json_each($1))
   and status in ('completed', 'failed', 'cancelled')
   and finished_at_ms is null;
delete from {schema}.runtime_queue
 where attempt_id in (select attempt_id from {schema}.runtime_attempts where rowid in (select value from json_each($1)));
insert into {schema}.runtime_queue ({waiting})
select {waiting}
  from {schema}.runtime_attempts
 where rowid in (select value from json_each($1))
   and status in ('queued', 'retry_backoff');
insert or replace into {schema}.runtime_finished ({finished})
select {finished}
  from {schema}.runtime_attempts
 where rowid in (select value from json_each($1))
   and status in ('completed', 'failed', 'cancelled');

-- name: unqueue @postgres
-- Take away what is said to wait at the places of a JSON array ($1) and does not. Locked as above.
with {given_and_waiting}, truth as (
    select a.attempt_id
      from given
      join {schema}.runtime_attempts as a on a.attempt_id = given.attempt_id
     where array(select attempt_id from waiting) is not null
       and a.status in ('queued', 'retry_backoff')
     order by a.attempt_id
       for no key update of a
)
delete from {schema}.runtime_queue as w
 using waiting
 where w.attempt_id = waiting.attempt_id
   and not exists (select 1 from truth where truth.attempt_id = w.attempt_id);

-- name: unqueue @sqlite
delete from {schema}.runtime_queue
 where rowid in (select value from json_each($1))
   and not exists (
           select 1
             from {schema}.runtime_attempts as a
            where a.attempt_id = runtime_queue.attempt_id
              and a.status in ('queued', 'retry_backoff'));
