-- Leases: who owns which attempt, and until when. The order of locks and the few rows to expect: see attempts.sql.
-- columns lease: l.lease_id, l.lease_expires_at_ms, l.heartbeat_at_ms, l.claimed_at_ms, {tried_of_a}
-- columns held: lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version, claimed_at_ms

-- part: leased_anew
-- There may be a lease that a cancel did not see, or one of version 1's.
do update
       set lease_id = excluded.lease_id, worker_id = excluded.worker_id, version = excluded.version,
           lease_expires_at_ms = excluded.lease_expires_at_ms, heartbeat_at_ms = excluded.heartbeat_at_ms,
           claimed_at_ms = excluded.claimed_at_ms

-- name: claim 1 10 100 1000 10000 @postgres
-- Take up to so many attempts ($6) of the queues ($1, a JSON array): the first among those that are ready and those that
-- are due, skipping what a rival is claiming at this instant. So many of each queue are locked in its index's order,
-- then the first of those are taken; an array compared with the queue would sort all that is ready. What is due and not
-- taken is promoted to ready. Of what is due the longest due are looked at, as many as are wanted: a backlog costs no
-- claim more than that, and shrinks with each.
-- Each lease's id is the claim's ($4) and the place of the attempt's row: two of one claim have never the same. A token
-- stops at the last one that there is, where another program has put it there: what gets that one is parked.
-- What does not wait any more was left behind, and is taken away. What does is leased, or all of it fails, where a limit
-- is computed even if there is no row: a trigger that skips the lease's would leave the attempt to nobody.
-- A lease that a cancel did not see, or one of version 1's, goes first: to insert where there may be one costs a tenth more.
with moment as (
    select coalesce($5::bigint, {now_ms}) as at
), open as (
    select named.value as queue
      from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as named (value)
     where {is_open}
), ready as (
    select found.place, found.attempt_id, found.priority, found.enqueued_at_ms
      from open as named
     cross join lateral (
               select place, attempt_id, priority, enqueued_at_ms
                 from (select ctid as place, attempt_id, priority, enqueued_at_ms
                         from {schema}.runtime_queue
                        where queue = named.queue
                          and retry_at_ms is null
                        order by priority desc, enqueued_at_ms, attempt_id
                        limit {most}
                          for update skip locked) as first
                limit $6) as found
), due as (
    select found.place, found.attempt_id, found.priority, found.enqueued_at_ms
      from open as named
     cross join lateral (
               select place, attempt_id, priority, enqueued_at_ms
                 from (select ctid as place, attempt_id, priority, enqueued_at_ms
                         from {schema}.runtime_queue
                        where queue = named.queue
                          and retry_at_ms is not null
                          and retry_at_ms <= coalesce($5::bigint, {now_ms})
                        order by retry_at_ms, attempt_id
                        limit {most}
                          for update skip locked) as first
                limit $6) as found
), chosen as (
    select place, attempt_id
      from (select place, attempt_id
              from (select place, attempt_id, priority, enqueued_at_ms from ready
                     union all
                    select place, attempt_id, priority, enqueued_at_ms from due) as candidates
             order by priority desc, enqueued_at_ms, attempt_id
             limit $6) as first
     where attempt_id = attempt_id || ''
       and attempt_id || '' = attempt_id
), taken as (
    delete from {schema}.runtime_queue as w
     where w.ctid = any (array(select place from chosen))
       and case when w.attempt_id <> '' then 1
                else (select 1 from {schema}.runtime_queue as same where same.attempt_id = w.attempt_id) end is not null
    returning w.attempt_id
), claimed as (
    update {schema}.runtime_attempts as a
       set status = 'leased', retry_at_ms = null, lease_version = least(lease_version, 9223372036854775806) + 1,
           worker_id = $2, ended_by = null,
           lease_id = $4 || pg_catalog.translate(a.ctid::pg_catalog.text, '(,)', '-.')
     where a.attempt_id = any (array(select attempt_id from taken))
       and {waits_still}
    returning {attempt_of_a}
), left_over as (
    select place, attempt_id
      from (select place, attempt_id from due
            except
            select place, attempt_id from chosen) as waiting
     where attempt_id = attempt_id || ''
       and attempt_id || '' = attempt_id
), promoted as (
    update {schema}.runtime_queue as w
       set retry_at_ms = null
      from left_over
     where w.ctid = left_over.place
    returning w.attempt_id
), ready_now as (
    update {schema}.runtime_attempts as a
       set status = 'queued', retry_at_ms = null
      from promoted
     where a.attempt_id = promoted.attempt_id
       and case when a.status in ('queued', 'retry_backoff') then 1 end is not null
), outlived as (
    delete from {schema}.runtime_leases
     where attempt_id = any (array(select attempt_id from claimed))
    returning 1
), leased as (
    insert into {schema}.runtime_leases ({held})
    select lease_id, attempt_id, $2, (select at from moment) + $3::bigint, (select at from moment), lease_version,
           (select at from moment)
      from claimed
     where (select pg_catalog.count(*) from outlived) is not null
    returning 1
)
select (select at from moment) + $3::bigint as lease_expires_at_ms, (select at from moment) as heartbeat_at_ms,
       (select at from moment) as claimed_at_ms, {attempt}
  from claimed
 order by priority desc, enqueued_at_ms, attempt_id
 limit case when (select pg_catalog.count(*) from leased) < (select pg_catalog.count(*) from taken)
             and ((select pg_catalog.count(*) from leased) < (select pg_catalog.count(*) from claimed)
                  or exists (
                         select 1
                           from {schema}.runtime_attempts as a
                          where a.attempt_id = any (array(select attempt_id from taken
                                                          except
                                                          select attempt_id from claimed))
                            and {waits_still}))
            then ('{skipped}: ' || (select pg_catalog.count(*) from taken)::pg_catalog.text)::bigint end;

-- part: what_is_due_is_promoted
-- On SQLite, as far as a claim looks at it ($7). SQLite has no lateral join; a correlated IN does the same, behind a cross
-- join: that is never turned round.
select nullif(json_group_array(w.rowid), '[]') as "$7"
  from json_each($1) as named
 cross join {schema}.runtime_queue as w
 where {is_open}
   and w.rowid in (
           select rowid
             from {schema}.runtime_queue
            where queue = named.value
              and retry_at_ms is not null
              and retry_at_ms <= coalesce($5, {now_ms})
            order by retry_at_ms, attempt_id
            limit $6);
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null
 where attempt_id in (
           select attempt_id from {schema}.runtime_queue where rowid in (select value from json_each($7)))
   and status in ('queued', 'retry_backoff');
update {schema}.runtime_queue
   set retry_at_ms = null
 where rowid in (select value from json_each($7))

-- part: ready
-- On SQLite, the places of the first of a queue.
(
           select rowid
             from {schema}.runtime_queue
            where queue = named.value
              and retry_at_ms is null
            order by priority desc, enqueued_at_ms, attempt_id
            limit $6)

-- name: claim 1 @sqlite
-- As above, in statements of one transaction, which holds the database's only write lock: here nobody rivals, and what
-- is due is promoted first. Then the first place ($8) is no place to wait any more, and its attempt ($9), if it does wait,
-- is leased from one moment ($10) on, or all of it fails.
{what_is_due_is_promoted};
select w.rowid as "$8", a.rowid as "$9", coalesce($5, {now_ms}) as "$10"
  from json_each($1) as named
 cross join {schema}.runtime_queue as w
  left join {schema}.runtime_attempts as a
    on a.attempt_id = w.attempt_id and a.status in ('queued', 'retry_backoff')
 where {is_open}
   and w.rowid = {ready}
 order by w.priority desc, w.enqueued_at_ms, w.attempt_id
 limit 1;
delete from {schema}.runtime_queue
 where rowid = $8;
update {schema}.runtime_attempts
   set status = 'leased', retry_at_ms = null, lease_version = min(lease_version, 9223372036854775806) + 1,
       worker_id = $2, ended_by = null, lease_id = $4 || '-' || rowid
 where rowid = $9;
insert into {schema}.runtime_leases ({held})
select lease_id, attempt_id, $2, $10 + $3, $10, lease_version, $10
  from {schema}.runtime_attempts
 where rowid = $9
   and json_extract('[]', case when changes() = 1 then '$' else '{skipped}' end) is not null
    on conflict (attempt_id) {leased_anew};
select $10 + $3 as lease_expires_at_ms, $10 as heartbeat_at_ms, $10 as claimed_at_ms, {attempt}
  from {schema}.runtime_attempts
 where rowid = $9
   and json_extract('[]', case when changes() = 1 then '$' else '{skipped}' end) is not null;

-- name: claim 10 100 1000 10000 @sqlite
-- As above, of several: the places ($8), and the attempts ($9) that do wait, so many ($10).
{what_is_due_is_promoted};
select nullif(json_group_array(first.place), '[]') as "$8",
       nullif(json_group_array(a.rowid) filter (where a.rowid is not null), '[]') as "$9",
       count(a.rowid) as "$10",
       coalesce($5, {now_ms}) as "$11"
  from (select w.rowid as place, w.attempt_id
          from json_each($1) as named
         cross join {schema}.runtime_queue as w
         where {is_open}
           and w.rowid in {ready}
         order by w.priority desc, w.enqueued_at_ms, w.attempt_id
         limit $6) as first
  left join {schema}.runtime_attempts as a
    on a.attempt_id = first.attempt_id and a.status in ('queued', 'retry_backoff');
delete from {schema}.runtime_queue
 where rowid in (select value from json_each($8));
update {schema}.runtime_attempts
   set status = 'leased', retry_at_ms = null, lease_version = min(lease_version, 9223372036854775806) + 1,
       worker_id = $2, ended_by = null, lease_id = $4 || '-' || rowid
 where rowid in (select value from json_each($9));
insert into {schema}.runtime_leases ({held})
select a.lease_id, a.attempt_id, $2, $11 + $3, $11, a.lease_version, $11
  from json_each($9) as chosen
 cross join {schema}.runtime_attempts as a
 where a.rowid = chosen.value
   and json_extract('[]', case when changes() = $10 then '$' else '{skipped}' end) is not null
    on conflict (attempt_id) {leased_anew};
select $11 + $3 as lease_expires_at_ms, $11 as heartbeat_at_ms, $11 as claimed_at_ms, {attempt_of_a}
  from json_each($9) as chosen
 cross join {schema}.runtime_attempts as a
 where a.rowid = chosen.value
   and json_extract('[]', case when changes() = $10 then '$' else '{skipped}' end) is not null
 order by a.priority desc, a.enqueued_at_ms, a.attempt_id;

-- name: claim_attempt @postgres
-- Take this attempt ($1), if it is ready or due, under the lease id $4.
with taken as (
    delete from {schema}.runtime_queue as w
     where w.attempt_id = $1
       and (w.retry_at_ms is null or w.retry_at_ms <= coalesce($5, {now_ms}))
       and (select 1 from (select w.queue as value) as named where {is_open}) is not null
    returning attempt_id
), claimed as (
    update {schema}.runtime_attempts
       set status = 'leased', retry_at_ms = null, lease_version = least(lease_version, 9223372036854775806) + 1,
           worker_id = $2, lease_id = $4, ended_by = null
     where attempt_id = (select attempt_id from taken)
       and status in ('queued', 'retry_backoff')
    returning {attempt}
), leased as (
    insert into {schema}.runtime_leases as l ({held})
    select lease_id, attempt_id, $2, coalesce($5, {now_ms}) + $3::bigint, coalesce($5, {now_ms}), lease_version,
           coalesce($5, {now_ms})
      from claimed
        on conflict (attempt_id) {leased_anew}
    returning l.lease_id, l.attempt_id, l.lease_expires_at_ms, l.heartbeat_at_ms, l.claimed_at_ms
)
select {lease}
  from leased as l
  join claimed as a on a.attempt_id = l.attempt_id
 limit case when (select pg_catalog.count(*) from leased) < (select pg_catalog.count(*) from claimed)
              or (select pg_catalog.count(*) from claimed) < (select pg_catalog.count(*) from taken)
                 and exists (
                         select 1
                           from {schema}.runtime_attempts
                          where attempt_id = $1
                            and status in ('queued', 'retry_backoff'))
            then ('{skipped}: ' || (select pg_catalog.count(*) from taken)::pg_catalog.text)::bigint end;

-- name: claim_attempt @sqlite
-- As above, in statements of one transaction: of the attempt's place ($6), and where it waits ($7).
select a.rowid as "$6", w.rowid as "$7", coalesce($5, {now_ms}) as "$8"
  from {schema}.runtime_queue as w
 cross join {schema}.runtime_attempts as a
 where w.attempt_id = $1
   and (w.retry_at_ms is null or w.retry_at_ms <= coalesce($5, {now_ms}))
   and (select 1 from (select w.queue as value) as named where {is_open}) is not null
   and a.attempt_id = w.attempt_id
   and a.status in ('queued', 'retry_backoff');
delete from {schema}.runtime_queue
 where rowid = $7;
update {schema}.runtime_attempts
   set status = 'leased', retry_at_ms = null, lease_version = min(lease_version, 9223372036854775806) + 1,
       worker_id = $2, lease_id = $4, ended_by = null
 where rowid = $6;
insert into {schema}.runtime_leases ({held})
select lease_id, attempt_id, $2, $8 + $3, $8, lease_version, $8
  from {schema}.runtime_attempts
 where rowid = $6
   and json_extract('[]', case when changes() = 1 then '$' else '{skipped}' end) is not null
    on conflict (attempt_id) {leased_anew};
select $8 + $3 as lease_expires_at_ms, $8 as heartbeat_at_ms, $8 as claimed_at_ms, {attempt}
  from {schema}.runtime_attempts
 where rowid = $6
   and json_extract('[]', case when changes() = 1 then '$' else '{skipped}' end) is not null;

-- name: give_back @postgres
-- Undo a claim ($1) whose caller was cancelled: the attempts are ready again and the try does not count. Returns their
-- queues. It reads all that is held.
with mine as (
    select a.attempt_id, l.lease_id
      from (select attempt_id, lease_id
              from {schema}.runtime_leases
             where lease_id = $1
                or pg_catalog.left(lease_id, pg_catalog.length($1) + 1) = $1 || '-') as l
      join {schema}.runtime_attempts as a on a.attempt_id = l.attempt_id
     where l.attempt_id = l.attempt_id || ''
     order by a.attempt_id
       for update of a
), ended as (
    delete from {schema}.runtime_leases as l
     using mine
     where l.attempt_id = mine.attempt_id
       and l.lease_id   = mine.lease_id
    returning l.attempt_id, l.version, l.lease_id
), freed as (
    update {schema}.runtime_attempts as a
       set status = 'queued', retry_at_ms = null, ended_by = 'give_back'
      from ended
     where a.attempt_id    = ended.attempt_id
       and a.lease_version = ended.version
       and a.lease_id      = ended.lease_id
       and a.status in ('leased', 'running')
    returning {waiting_of_a}
), queued as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from freed
        on conflict (attempt_id) {replaced}
)
select queue from freed;

-- name: give_back @sqlite
-- As above, in statements of one transaction: the places of the attempts ($2).
select nullif(json_group_array(a.rowid), '[]') as "$2"
  from {schema}.runtime_leases as l
 cross join {schema}.runtime_attempts as a
 where (l.lease_id = $1 or l.lease_id > $1 || '-' and l.lease_id < $1 || '.')
   and a.attempt_id    = l.attempt_id
   and a.lease_version = l.version
   and a.lease_id      = l.lease_id
   and a.status in ('leased', 'running');
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null, ended_by = 'give_back'
 where rowid in (select value from json_each($2))
returning queue;
insert into {schema}.runtime_queue ({waiting})
select {waiting}
  from {schema}.runtime_attempts
 where rowid in (select value from json_each($2))
   and ended_by = 'give_back'
    on conflict (attempt_id) {replaced};
delete from {schema}.runtime_leases
 where attempt_id in (select attempt_id from {schema}.runtime_attempts where rowid in (select value from json_each($2)));

-- name: heartbeat
-- Keep a lease, while it is still this token's and has not run out. Fenced on the lease's own row, and it looks at the
-- attempt as well: a cancel that waited for a claim to commit did not see its lease, which is there still and owns
-- nothing.
update {schema}.runtime_leases
   set heartbeat_at_ms     = coalesce($4, {now_ms}),
       lease_expires_at_ms = coalesce($4, {now_ms}) + $3
 where attempt_id = $5
   and lease_id   = $1
   and version    = $2
   and lease_expires_at_ms > coalesce($4, {now_ms})
   and exists (
           select 1
             from {schema}.runtime_attempts
            where attempt_id    = $5
              and lease_version = $2
              and lease_id      = $1
              and status in ('leased', 'running'))
returning heartbeat_at_ms, lease_expires_at_ms;

-- name: heartbeat_many @postgres
-- As heartbeat, for each lease of a JSON array. The attempts are locked first, in the order of ids, as by everybody who
-- writes several leases. All are found by arrays, as in attempts.complete_many, and what is given is looked up for each: in
-- a case it is never joined. A lease's id has one token only.
with given as (
    select lease_id, attempt_id, token
      from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json) as x (
               lease_id pg_catalog.text, attempt_id pg_catalog.text, token bigint)
), locked as (
    select a.attempt_id, a.lease_id
      from {schema}.runtime_attempts as a
     where a.attempt_id = any (array(select attempt_id from given))
       and case when a.status not in ('leased', 'running')
                then (select null::int from {schema}.runtime_attempts as same where same.attempt_id = a.attempt_id)
                when (a.attempt_id, a.lease_version, a.lease_id) in (select attempt_id, token, lease_id from given)
                then 1 end is not null
     order by a.attempt_id
       for update of a
)
update {schema}.runtime_leases
   set heartbeat_at_ms     = coalesce($3, {now_ms}),
       lease_expires_at_ms = coalesce($3, {now_ms}) + $2::bigint
 where attempt_id = any (array(select attempt_id from locked))
   and lease_id = any (array(select lease_id from locked))
   and lease_expires_at_ms > coalesce($3, {now_ms})
returning lease_id, heartbeat_at_ms, lease_expires_at_ms;

-- name: heartbeat_many @sqlite
-- As above: here nobody else is writing.
update {schema}.runtime_leases
   set heartbeat_at_ms     = coalesce($3, {now_ms}),
       lease_expires_at_ms = coalesce($3, {now_ms}) + $2
 where (attempt_id, lease_id, version) in (
           select a.attempt_id, a.lease_id, a.lease_version
             from json_each($1) as given
             join {schema}.runtime_attempts as a
               on a.attempt_id    = json_extract(given.value, '$.attempt_id')
              and a.lease_version = json_extract(given.value, '$.token')
              and a.lease_id      = json_extract(given.value, '$.lease_id')
            where a.status in ('leased', 'running'))
   and lease_expires_at_ms > coalesce($3, {now_ms})
returning lease_id, heartbeat_at_ms, lease_expires_at_ms;

-- name: release @postgres
-- Give the attempt back, at once or after a delay ($3): the try does not count.
with released as (
    update {schema}.runtime_attempts
       set status = 'queued', retry_at_ms = coalesce($4, {now_ms}) + $3::bigint, ended_by = 'release'
     where attempt_id    = $1
       and lease_version = $2
       and lease_id      = $5
       and status in ('leased', 'running')
    returning {attempt}
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id = (select attempt_id from released)
), queued as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from released
        on conflict (attempt_id) {replaced}
)
select {attempt}
  from released;

-- name: release @sqlite
-- As above, in statements of one transaction.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = coalesce($4, {now_ms}) + $3, ended_by = 'release'
 where attempt_id    = $1
   and lease_version = $2
   and lease_id      = $5
   and status in ('leased', 'running')
returning {attempt};
insert into {schema}.runtime_queue ({waiting})
select {waiting}
  from {schema}.runtime_attempts
 where attempt_id = $1
   and changes() > 0
    on conflict (attempt_id) {replaced};
delete from {schema}.runtime_leases
 where attempt_id = $1
   and changes() > 0;

-- name: list @postgres
-- One page of all leases, in the order of their ids, after the last id of the page before. It reads all that is
-- held; what is on the page is looked up.
select {lease}
  from (select lease_id, attempt_id, lease_expires_at_ms, heartbeat_at_ms, claimed_at_ms
          from {schema}.runtime_leases
         where lease_id > $1
         order by lease_id) as l
 cross join lateral (
           select {attempt}
             from {schema}.runtime_attempts
            where attempt_id = l.attempt_id
            limit 1) as a
 order by l.lease_id
 limit $2;

-- name: list @sqlite
select {lease}
  from (select lease_id, attempt_id, lease_expires_at_ms, heartbeat_at_ms, claimed_at_ms
          from {schema}.runtime_leases
         where lease_id > $1
           and exists (
                   select 1 from {schema}.runtime_attempts as a where a.attempt_id = runtime_leases.attempt_id)
         order by lease_id
         limit $2) as l
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = l.attempt_id
 order by l.lease_id;

-- name: list_by_worker @postgres
-- As above, of one worker.
select {lease}
  from (select lease_id, attempt_id, lease_expires_at_ms, heartbeat_at_ms, claimed_at_ms
          from {schema}.runtime_leases
         where worker_id = $1
           and lease_id > $2
         order by lease_id) as l
 cross join lateral (
           select {attempt}
             from {schema}.runtime_attempts
            where attempt_id = l.attempt_id
            limit 1) as a
 order by l.lease_id
 limit $3;

-- name: list_by_worker @sqlite
select {lease}
  from (select lease_id, attempt_id, lease_expires_at_ms, heartbeat_at_ms, claimed_at_ms
          from {schema}.runtime_leases
         where worker_id = $1
           and lease_id > $2
           and exists (
                   select 1 from {schema}.runtime_attempts as a where a.attempt_id = runtime_leases.attempt_id)
         order by lease_id
         limit $3) as l
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = l.attempt_id
 order by l.lease_id;

-- name: holder
-- Who holds an attempt now, and under which token, and whether its lease has not run out. A lease that outlived a cancel
-- holds nothing.
select a.status, a.lease_version, a.lease_id, l.worker_id,
       l.lease_id = a.lease_id and l.version = a.lease_version
           and l.lease_expires_at_ms > coalesce($2, {now_ms}) as holds
  from {schema}.runtime_attempts as a
  left join {schema}.runtime_leases as l on l.attempt_id = a.attempt_id and a.status in ('leased', 'running')
 where a.attempt_id = $1;

-- name: held_many @postgres
-- Which of the attempts of a JSON array are held, under which token, by a lease that has not run out.
select a.attempt_id, a.lease_version, a.lease_id
  from (select value
          from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as x (value)
         where value = value || '') as given
  join {schema}.runtime_attempts as a on a.attempt_id = given.value
  join {schema}.runtime_leases as l
    on l.attempt_id = a.attempt_id and l.lease_id = a.lease_id and l.version = a.lease_version
 where case when a.status in ('leased', 'running') then 1 end is not null
   and case when l.lease_expires_at_ms > coalesce($2, {now_ms}) then 1 end is not null;

-- name: held_many @sqlite
select a.attempt_id, a.lease_version, a.lease_id
  from {schema}.runtime_attempts as a
  join {schema}.runtime_leases as l
    on l.attempt_id = a.attempt_id and l.lease_id = a.lease_id and l.version = a.lease_version
 where a.attempt_id in (select value from json_each($1))
   and a.status in ('leased', 'running')
   and l.lease_expires_at_ms > coalesce($2, {now_ms});

-- name: park @postgres
-- Take the attempt ($4) out of the way that was just claimed under a lease ($1) and cannot be read, and say why ($2): as a
-- failed one an operator finds it. Fenced by the lease's id, for what it holds may be anything.
with parked as (
    update {schema}.runtime_attempts
       set status = 'failed', retry_at_ms = null, error = $2, finished_at_ms = coalesce($3, {now_ms}), ended_by = 'park'
     where attempt_id = $4
       and lease_id   = $1
       and status in ('leased', 'running')
    returning {finished}
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from parked
        on conflict do nothing
)
delete from {schema}.runtime_leases
 where attempt_id = (select attempt_id from parked)
   and lease_id   = $1;

-- name: park @sqlite
-- As above, in statements of one transaction. What a key holds may be no text, so its place ($5) is looked for.
select a.rowid as "$5"
  from {schema}.runtime_leases as l
 cross join {schema}.runtime_attempts as a
 where l.lease_id   = $1
   and a.attempt_id = l.attempt_id
   and a.lease_id   = $1
   and a.status in ('leased', 'running');
update {schema}.runtime_attempts
   set status = 'failed', retry_at_ms = null, error = $2, finished_at_ms = coalesce($3, {now_ms}), ended_by = 'park'
 where rowid = $5;
insert or replace into {schema}.runtime_finished ({finished})
select {finished}
  from {schema}.runtime_attempts
 where rowid = $5
   and changes() > 0;
delete from {schema}.runtime_leases
 where attempt_id = (select attempt_id from {schema}.runtime_attempts where rowid = $5 and ended_by = 'park');

-- name: requeue_expired @postgres
-- Take attempts from workers that fell silent. The attempt is locked first, skipping those that are being written, then
-- the lease is deleted only if it still is expired (a heartbeat may have come in between), and only what was deleted
-- is requeued. The lost try counts, so an attempt that kills its workers ends as failed.
-- A lease that lasts for more than a thousand years is another program's mistake.
-- A lease whose attempt is gone, or is nobody's to hold, is deleted with them: as many as are looked at, skipping what
-- a claim is writing anew. None keeps the sweep from those behind it.
-- With an attempt's id ($4) it is done for this one alone, also where it is held under no lease: it is taken if it still
-- has the token and the id under which it was seen to have none, for whoever claims it meanwhile gives it others.
with late as materialized (
    (select l.attempt_id
       from {schema}.runtime_leases as l
      where l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3::bigint
        and ($4::pg_catalog.text is null or l.attempt_id = $4)
        and (select a.status
               from {schema}.runtime_attempts as a
              where a.attempt_id = l.attempt_id) in ('leased', 'running')
      order by l.lease_expires_at_ms
      limit $1)
     union all
    (select l.attempt_id
       from {schema}.runtime_leases as l
      where l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long}
        and ($4::pg_catalog.text is null or l.attempt_id = $4)
        and (select a.status
               from {schema}.runtime_attempts as a
              where a.attempt_id = l.attempt_id) in ('leased', 'running')
      order by l.lease_expires_at_ms
      limit $1)
), expired as (
    select a.attempt_id
      from {schema}.runtime_attempts as a
     where a.attempt_id = any (array(select attempt_id from late limit $1))
       and {held_still}
     order by a.attempt_id
       for update of a skip locked
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id = any (array(select attempt_id from expired))
       and (lease_expires_at_ms <= coalesce($2, {now_ms}) - $3::bigint
            or lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long})
    returning attempt_id
), stranded as (
    select held.attempt_id, held.lease_version, held.lease_id
      from {schema}.runtime_attempts as held
     where held.attempt_id = $4
       and held.status in ('leased', 'running')
       and not exists (select 1 from {schema}.runtime_leases as l where l.attempt_id = held.attempt_id)
), taken as (
    select a.attempt_id
      from stranded
      join {schema}.runtime_attempts as a
        on a.attempt_id = stranded.attempt_id and a.lease_version = stranded.lease_version
     where a.lease_id is not distinct from stranded.lease_id
       and a.status in ('leased', 'running')
       for update of a skip locked
), idle as materialized (
    (select attempt_id, lease_id
       from {schema}.runtime_leases
      where lease_expires_at_ms <= coalesce($2, {now_ms}) - $3::bigint
      order by lease_expires_at_ms
      limit $1)
     union all
    (select attempt_id, lease_id
       from {schema}.runtime_leases
      where lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long}
      order by lease_expires_at_ms
      limit $1)
), nobodys as (
    select l.attempt_id
      from {schema}.runtime_leases as l
     where l.attempt_id = any (array(select attempt_id from idle))
       and l.lease_id = any (array(select lease_id from idle))
       and case when l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3::bigint
                  or l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long} then 1 end is not null
       and $4::pg_catalog.text is null
       and (select 1
              from {schema}.runtime_attempts as a
             where a.attempt_id = l.attempt_id
               and a.status in ('leased', 'running')) is null
       for update of l skip locked
), orphans as (
    delete from {schema}.runtime_leases
     where attempt_id = any (array(select attempt_id from nobodys))
), freed as (
    update {schema}.runtime_attempts as a
       set status         = case when attempt_no >= max_attempts then 'failed' else 'queued' end,
           attempt_no     = case when attempt_no >= max_attempts then attempt_no else attempt_no + 1 end,
           retry_at_ms    = null,
           finished_at_ms = case when attempt_no >= max_attempts then coalesce($2, {now_ms}) end,
           error          = 'the lease of worker '
                                || coalesce((select l.worker_id
                                               from {schema}.runtime_leases as l
                                              where l.attempt_id = a.attempt_id), worker_id, 'unknown')
                                || case when attempt_id in (select attempt_id from taken) then ' is gone' else ' expired' end,
           ended_by       = 'expire'
     where a.attempt_id = any (array(select attempt_id from ended union all select attempt_id from taken))
       and {held_still}
    returning {attempt_of_a}
), queued as (
    insert into {schema}.runtime_queue ({waiting})
    select {waiting} from freed where status = 'queued'
        on conflict (attempt_id) {replaced}
), listed as (
    insert into {schema}.runtime_finished ({finished})
    select {finished} from freed where status = 'failed'
        on conflict do nothing
)
select {attempt}
  from freed;

-- part: just_requeued
-- On SQLite, what the first statement of the sweep has taken.
(
        select attempt_id
          from (select l.attempt_id
                  from {schema}.runtime_leases as l
                 where l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3
                   and (select a.ended_by = 'expire' and a.lease_id = l.lease_id
                          from {schema}.runtime_attempts as a
                         where a.attempt_id = l.attempt_id)
                 order by l.lease_expires_at_ms
                 limit $1)
         union all
        select attempt_id
          from (select l.attempt_id
                  from {schema}.runtime_leases as l
                 where l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long}
                   and (select a.ended_by = 'expire' and a.lease_id = l.lease_id
                          from {schema}.runtime_attempts as a
                         where a.attempt_id = l.attempt_id)
                 limit $1)
         union all
        select $4)

-- name: requeue_expired @sqlite
-- As above, in statements of one transaction. The clock moves between them, so each goes by what the first one wrote.
-- A time that is text or bytes is beyond all numbers.
update {schema}.runtime_attempts
   set status         = case when attempt_no >= max_attempts then 'failed' else 'queued' end,
       attempt_no     = case when attempt_no >= max_attempts then attempt_no else attempt_no + 1 end,
       retry_at_ms    = null,
       finished_at_ms = case when attempt_no >= max_attempts then coalesce($2, {now_ms}) end,
       error          = 'the lease of worker ' || coalesce(worker_id, 'unknown')
                            || case when exists (
                                             select 1
                                               from {schema}.runtime_leases as l
                                              where l.attempt_id = runtime_attempts.attempt_id)
                                    then ' expired' else ' is gone' end,
       ended_by       = 'expire'
 where status in ('leased', 'running')
   and attempt_id in (
           select attempt_id
             from (select attempt_id
                     from (select l.attempt_id
                             from {schema}.runtime_leases as l
                            where l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3
                              and ($4 is null or l.attempt_id = $4)
                              and (select a.status
                                     from {schema}.runtime_attempts as a
                                    where a.attempt_id = l.attempt_id) in ('leased', 'running')
                            order by l.lease_expires_at_ms
                            limit $1) as expired
                    union all
                   select attempt_id
                     from (select l.attempt_id
                             from {schema}.runtime_leases as l
                            where l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long}
                              and ($4 is null or l.attempt_id = $4)
                              and (select a.status
                                     from {schema}.runtime_attempts as a
                                    where a.attempt_id = l.attempt_id) in ('leased', 'running')
                            limit $1) as endless
                    union all
                   select a.attempt_id
                     from {schema}.runtime_attempts as a
                    where a.attempt_id = $4
                      and a.status in ('leased', 'running')
                      and not exists (select 1 from {schema}.runtime_leases as l where l.attempt_id = a.attempt_id))
                       as silent
            limit $1)
returning {attempt};
insert into {schema}.runtime_queue ({waiting})
select {waiting_of_a}
  from {just_requeued} as silent
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = silent.attempt_id
   and a.status     = 'queued'
   and a.ended_by   = 'expire'
    on conflict (attempt_id) {replaced};
insert or replace into {schema}.runtime_finished ({finished})
select {finished_of_a}
  from {just_requeued} as silent
 cross join {schema}.runtime_attempts as a
 where a.attempt_id = silent.attempt_id
   and a.status     = 'failed'
   and a.ended_by   = 'expire';
delete from {schema}.runtime_leases
 where attempt_id in (
           select l.attempt_id
             from {schema}.runtime_leases as l
            where (l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3
                   or l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long})
              and (select a.status in ('queued', 'failed') and a.ended_by = 'expire' and a.lease_id = l.lease_id
                     from {schema}.runtime_attempts as a
                    where a.attempt_id = l.attempt_id)
            limit $1);
delete from {schema}.runtime_leases
 where attempt_id in (
           select attempt_id
             from {schema}.runtime_leases
            where lease_expires_at_ms <= coalesce($2, {now_ms}) - $3
               or lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long}
            limit $1)
   and $4 is null
   and not exists (
           select 1
             from {schema}.runtime_attempts as a
            where a.attempt_id = runtime_leases.attempt_id
              and a.status in ('leased', 'running'));

-- name: list_silent
-- The ids of what the sweep would take, at most $1 of each kind.
select attempt_id
  from (select l.attempt_id
          from {schema}.runtime_leases as l
         where l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3
         order by l.lease_expires_at_ms
         limit $1) as expired
 union all
select attempt_id
  from (select l.attempt_id
          from {schema}.runtime_leases as l
         where l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long}
         order by l.lease_expires_at_ms
         limit $1) as endless;
