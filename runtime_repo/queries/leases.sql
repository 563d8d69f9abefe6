-- Leases: who owns which attempt, and until when. Every statement locks attempts first, then leases.

-- name: claim @postgres
-- Take up to as many attempts of one queue ($1) as there are lease ids ($4, a JSON array): the first among those that
-- are ready and those that are due, skipping what a rival is claiming at this instant. What is due and not taken is
-- promoted to ready. Of what is due the longest due are looked at, as many as are wanted: a backlog costs no claim more
-- than that, and shrinks with each. Which lease id is whose is looked up in one object: what is chosen is thought to be
-- one row, and joined to the attempts it would be read anew for each. A token stops at the last one that there is, where
-- another program has put it there: what gets that one is parked. What is chosen is leased, or all of it fails, where a limit is
-- computed even if there is no row: a trigger that skips the lease's would leave the attempt to nobody.
with moment as (
    select coalesce($5, {now_ms}) as at
), ready as (
    select attempt_id, priority, enqueued_at_ms
      from {schema}.runtime_attempts
     where queue = $1
       and status = 'queued'
       and retry_at_ms is null
     order by priority desc, enqueued_at_ms, attempt_id
     limit pg_catalog.json_array_length($4::pg_catalog.text::pg_catalog.json)
       for update skip locked
), due as (
    select attempt_id, priority, enqueued_at_ms
      from {schema}.runtime_attempts
     where queue = $1
       and status in ('queued', 'retry_backoff')
       and retry_at_ms is not null
       and retry_at_ms <= coalesce($5, {now_ms})
     order by retry_at_ms, attempt_id
     limit pg_catalog.json_array_length($4::pg_catalog.text::pg_catalog.json)
       for update skip locked
), chosen as (
    select attempt_id, pg_catalog.row_number() over () as n
      from (select attempt_id
              from (select attempt_id, priority, enqueued_at_ms from ready
                     union all
                    select attempt_id, priority, enqueued_at_ms from due) as candidates
             order by priority desc, enqueued_at_ms, attempt_id
             limit pg_catalog.json_array_length($4::pg_catalog.text::pg_catalog.json)) as first
), claimed as (
    update {schema}.runtime_attempts
       set status = 'leased', retry_at_ms = null, lease_version = least(lease_version, 9223372036854775806) + 1,
           worker_id = $2, ended_by = null,
           lease_id = (select pg_catalog.jsonb_object_agg(chosen.attempt_id, given.lease_id)
                         from chosen
                         join pg_catalog.json_array_elements_text($4::pg_catalog.text::pg_catalog.json) with ordinality
                                  as given (lease_id, n) on given.n = chosen.n) ->> attempt_id
     where attempt_id = any (array(select attempt_id from chosen))
    returning {attempt}
), promoted as (
    update {schema}.runtime_attempts
       set status = 'queued', retry_at_ms = null
     where attempt_id = any (array(select attempt_id from due except select attempt_id from chosen))
), leased as (
    insert into {schema}.runtime_leases as l
           (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version, claimed_at_ms)
    select lease_id, attempt_id, $2, (select at from moment) + $3::bigint, (select at from moment), lease_version,
           (select at from moment)
      from claimed
        on conflict (attempt_id) do update
       set lease_id = excluded.lease_id, worker_id = excluded.worker_id, version = excluded.version,
           lease_expires_at_ms = excluded.lease_expires_at_ms, heartbeat_at_ms = excluded.heartbeat_at_ms,
           claimed_at_ms = excluded.claimed_at_ms
    returning 1
)
select (select at from moment) + $3::bigint as lease_expires_at_ms, (select at from moment) as heartbeat_at_ms,
       (select at from moment) as claimed_at_ms, {attempt}
  from claimed
 order by priority desc, enqueued_at_ms, attempt_id
 limit case when (select pg_catalog.count(*) from leased) < (select pg_catalog.count(*) from chosen)
            then ('{skipped}: ' || (select pg_catalog.count(*) from chosen)::pg_catalog.text)::bigint end;

-- name: claim @sqlite
-- As above, in statements of one transaction, which holds the database's only write lock: here nobody rivals, and
-- what is due is promoted first. A file of version 1 may hold a key that is NULL, which nothing can be done with. All
-- of it fails if a lease has no attempt, or if less is leased than is wanted and some is still ready: a trigger skipped it.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null
 where attempt_id in (
           select attempt_id
             from {schema}.runtime_attempts
            where queue = $1
              and status in ('queued', 'retry_backoff')
              and retry_at_ms is not null
              and retry_at_ms <= coalesce($5, {now_ms})
            order by retry_at_ms, attempt_id
            limit json_array_length($4));
insert into {schema}.runtime_leases
       (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version, claimed_at_ms)
select given.value, ready.attempt_id, $2, coalesce($5, {now_ms}) + $3, coalesce($5, {now_ms}),
       min(ready.lease_version, 9223372036854775806) + 1, coalesce($5, {now_ms})
  from (select attempt_id, lease_version, row_number() over () - 1 as n
          from (select attempt_id, lease_version
                  from {schema}.runtime_attempts
                 where queue = $1
                   and status = 'queued'
                   and retry_at_ms is null
                   and attempt_id is not null
                 order by priority desc, enqueued_at_ms, attempt_id
                 limit json_array_length($4))) as ready
  join json_each($4) as given on given.key = ready.n
 where true
    on conflict (attempt_id) do update
   set lease_id = excluded.lease_id, worker_id = excluded.worker_id, version = excluded.version,
       lease_expires_at_ms = excluded.lease_expires_at_ms, heartbeat_at_ms = excluded.heartbeat_at_ms,
       claimed_at_ms = excluded.claimed_at_ms;
update {schema}.runtime_attempts
   set status = 'leased', lease_version = min(lease_version, 9223372036854775806) + 1, worker_id = $2, ended_by = null,
       lease_id = (select lease_id from {schema}.runtime_leases as l where l.attempt_id = runtime_attempts.attempt_id)
 where attempt_id in (
           select attempt_id from {schema}.runtime_leases where lease_id in (select value from json_each($4)));
select json_extract('[]', case when changes() < leased.n then '{skipped}'
                               when leased.n = json_array_length($4) then '$'
                               when (select attempt_id
                                       from {schema}.runtime_attempts
                                      where queue = $1
                                        and status = 'queued'
                                        and retry_at_ms is null
                                        and attempt_id is not null
                                      order by priority desc, enqueued_at_ms, attempt_id
                                      limit 1) is null then '$'
                               else '{skipped}' end)
  from (select count(*) as n from {schema}.runtime_leases where lease_id in (select value from json_each($4))) as leased;
select {lease}
  from {schema}.runtime_leases as l
  join {schema}.runtime_attempts as a on a.attempt_id = l.attempt_id
 where l.lease_id in (select value from json_each($4))
   and a.lease_id = l.lease_id
 order by a.priority desc, a.enqueued_at_ms, a.attempt_id;

-- name: claim_from_several @postgres
-- As above, from several queues ($1, a JSON array): so many of each in its index's order, then the first of those. An
-- array compared with the queue would sort all that is ready.
with moment as (
    select coalesce($5, {now_ms}) as at
), ready as (
    select found.attempt_id, found.priority, found.enqueued_at_ms
      from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as named (queue)
     cross join lateral (
               select attempt_id, priority, enqueued_at_ms
                 from {schema}.runtime_attempts
                where queue = named.queue
                  and status = 'queued'
                  and retry_at_ms is null
                order by priority desc, enqueued_at_ms, attempt_id
                limit pg_catalog.json_array_length($4::pg_catalog.text::pg_catalog.json)
                  for update skip locked) as found
), due as (
    select found.attempt_id, found.priority, found.enqueued_at_ms
      from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as named (queue)
     cross join lateral (
               select attempt_id, priority, enqueued_at_ms
                 from {schema}.runtime_attempts
                where queue = named.queue
                  and status in ('queued', 'retry_backoff')
                  and retry_at_ms is not null
                  and retry_at_ms <= coalesce($5, {now_ms})
                order by retry_at_ms, attempt_id
                limit pg_catalog.json_array_length($4::pg_catalog.text::pg_catalog.json)
                  for update skip locked) as found
), chosen as (
    select attempt_id, pg_catalog.row_number() over () as n
      from (select attempt_id
              from (select attempt_id, priority, enqueued_at_ms from ready
                     union all
                    select attempt_id, priority, enqueued_at_ms from due) as candidates
             order by priority desc, enqueued_at_ms, attempt_id
             limit pg_catalog.json_array_length($4::pg_catalog.text::pg_catalog.json)) as first
), claimed as (
    update {schema}.runtime_attempts
       set status = 'leased', retry_at_ms = null, lease_version = least(lease_version, 9223372036854775806) + 1,
           worker_id = $2, ended_by = null,
           lease_id = (select pg_catalog.jsonb_object_agg(chosen.attempt_id, given.lease_id)
                         from chosen
                         join pg_catalog.json_array_elements_text($4::pg_catalog.text::pg_catalog.json) with ordinality
                                  as given (lease_id, n) on given.n = chosen.n) ->> attempt_id
     where attempt_id = any (array(select attempt_id from chosen))
    returning {attempt}
), promoted as (
    update {schema}.runtime_attempts
       set status = 'queued', retry_at_ms = null
     where attempt_id = any (array(select attempt_id from due except select attempt_id from chosen))
), leased as (
    insert into {schema}.runtime_leases as l
           (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version, claimed_at_ms)
    select lease_id, attempt_id, $2, (select at from moment) + $3::bigint, (select at from moment), lease_version,
           (select at from moment)
      from claimed
        on conflict (attempt_id) do update
       set lease_id = excluded.lease_id, worker_id = excluded.worker_id, version = excluded.version,
           lease_expires_at_ms = excluded.lease_expires_at_ms, heartbeat_at_ms = excluded.heartbeat_at_ms,
           claimed_at_ms = excluded.claimed_at_ms
    returning 1
)
select (select at from moment) + $3::bigint as lease_expires_at_ms, (select at from moment) as heartbeat_at_ms,
       (select at from moment) as claimed_at_ms, {attempt}
  from claimed
 order by priority desc, enqueued_at_ms, attempt_id
 limit case when (select pg_catalog.count(*) from leased) < (select pg_catalog.count(*) from chosen)
            then ('{skipped}: ' || (select pg_catalog.count(*) from chosen)::pg_catalog.text)::bigint end;

-- name: claim_from_several @sqlite
-- As above. SQLite has no lateral join; a correlated IN does the same, behind a cross join: that is never turned round,
-- as SQLite would once it has statistics, to ask for every attempt.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null
 where attempt_id in (
           select a.attempt_id
             from json_each($1) as named
            cross join {schema}.runtime_attempts as a
            where a.attempt_id in (
                      select attempt_id
                        from {schema}.runtime_attempts
                       where queue = named.value
                         and status in ('queued', 'retry_backoff')
                         and retry_at_ms is not null
                         and retry_at_ms <= coalesce($5, {now_ms})
                       order by retry_at_ms, attempt_id
                       limit json_array_length($4)));
insert into {schema}.runtime_leases
       (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version, claimed_at_ms)
select given.value, ready.attempt_id, $2, coalesce($5, {now_ms}) + $3, coalesce($5, {now_ms}),
       min(ready.lease_version, 9223372036854775806) + 1, coalesce($5, {now_ms})
  from (select attempt_id, lease_version, row_number() over () - 1 as n
          from (select attempt_id, lease_version
                  from (select a.attempt_id, a.lease_version, a.priority, a.enqueued_at_ms
                          from json_each($1) as named
                         cross join {schema}.runtime_attempts as a
                         where a.attempt_id in (
                                   select attempt_id
                                     from {schema}.runtime_attempts
                                    where queue = named.value
                                      and status = 'queued'
                                      and retry_at_ms is null
                                      and attempt_id is not null
                                    order by priority desc, enqueued_at_ms, attempt_id
                                    limit json_array_length($4))) as candidates
                 order by priority desc, enqueued_at_ms, attempt_id
                 limit json_array_length($4))) as ready
  join json_each($4) as given on given.key = ready.n
 where true
    on conflict (attempt_id) do update
   set lease_id = excluded.lease_id, worker_id = excluded.worker_id, version = excluded.version,
       lease_expires_at_ms = excluded.lease_expires_at_ms, heartbeat_at_ms = excluded.heartbeat_at_ms,
       claimed_at_ms = excluded.claimed_at_ms;
update {schema}.runtime_attempts
   set status = 'leased', lease_version = min(lease_version, 9223372036854775806) + 1, worker_id = $2, ended_by = null,
       lease_id = (select lease_id from {schema}.runtime_leases as l where l.attempt_id = runtime_attempts.attempt_id)
 where attempt_id in (
           select attempt_id from {schema}.runtime_leases where lease_id in (select value from json_each($4)));
select json_extract('[]', case when changes() < leased.n then '{skipped}'
                               when leased.n = json_array_length($4) then '$'
                               when not exists (
                                        select 1
                                          from json_each($1) as named
                                         where (select attempt_id
                                                  from {schema}.runtime_attempts
                                                 where queue = named.value
                                                   and status = 'queued'
                                                   and retry_at_ms is null
                                                   and attempt_id is not null
                                                 order by priority desc, enqueued_at_ms, attempt_id
                                                 limit 1) is not null) then '$'
                               else '{skipped}' end)
  from (select count(*) as n from {schema}.runtime_leases where lease_id in (select value from json_each($4))) as leased;
select {lease}
  from {schema}.runtime_leases as l
  join {schema}.runtime_attempts as a on a.attempt_id = l.attempt_id
 where l.lease_id in (select value from json_each($4))
   and a.lease_id = l.lease_id
 order by a.priority desc, a.enqueued_at_ms, a.attempt_id;

-- name: claim_attempt @postgres
-- Take this attempt ($1), if it is ready or due, under the lease id $4.
with claimed as (
    update {schema}.runtime_attempts
       set status = 'leased', retry_at_ms = null, lease_version = least(lease_version, 9223372036854775806) + 1,
           worker_id = $2,
           lease_id = $4, ended_by = null
     where attempt_id = $1
       and status in ('queued', 'retry_backoff')
       and (retry_at_ms is null or retry_at_ms <= coalesce($5, {now_ms}))
    returning {attempt}
), leased as (
    insert into {schema}.runtime_leases as l
           (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version, claimed_at_ms)
    select lease_id, attempt_id, $2, coalesce($5, {now_ms}) + $3::bigint, coalesce($5, {now_ms}), lease_version,
           coalesce($5, {now_ms})
      from claimed
        on conflict (attempt_id) do update
       set lease_id = excluded.lease_id, worker_id = excluded.worker_id, version = excluded.version,
           lease_expires_at_ms = excluded.lease_expires_at_ms, heartbeat_at_ms = excluded.heartbeat_at_ms,
           claimed_at_ms = excluded.claimed_at_ms
    returning l.lease_id, l.attempt_id, l.lease_expires_at_ms, l.heartbeat_at_ms, l.claimed_at_ms
)
select {lease}
  from leased as l
  join claimed as a on a.attempt_id = l.attempt_id
 limit case when (select pg_catalog.count(*) from leased) < (select pg_catalog.count(*) from claimed)
            then ('{skipped}: ' || (select pg_catalog.count(*) from claimed)::pg_catalog.text)::bigint end;

-- name: claim_attempt @sqlite
-- As above, in statements of one transaction.
insert into {schema}.runtime_leases
       (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version, claimed_at_ms)
select $4, attempt_id, $2, coalesce($5, {now_ms}) + $3, coalesce($5, {now_ms}),
       min(lease_version, 9223372036854775806) + 1, coalesce($5, {now_ms})
  from {schema}.runtime_attempts
 where attempt_id = $1
   and status in ('queued', 'retry_backoff')
   and (retry_at_ms is null or retry_at_ms <= coalesce($5, {now_ms}))
    on conflict (attempt_id) do update
   set lease_id = excluded.lease_id, worker_id = excluded.worker_id, version = excluded.version,
       lease_expires_at_ms = excluded.lease_expires_at_ms, heartbeat_at_ms = excluded.heartbeat_at_ms,
       claimed_at_ms = excluded.claimed_at_ms;
update {schema}.runtime_attempts
   set status = 'leased', retry_at_ms = null, lease_version = min(lease_version, 9223372036854775806) + 1,
       worker_id = $2, lease_id = $4, ended_by = null
 where attempt_id in (select attempt_id from {schema}.runtime_leases where lease_id = $4);
select json_extract('[]', '{skipped}')
  from {schema}.runtime_attempts
 where attempt_id = $1
   and changes() = 0
   and (status in ('queued', 'retry_backoff') and retry_at_ms is null
        or exists (select 1 from {schema}.runtime_leases where lease_id = $4));
select {lease}
  from {schema}.runtime_leases as l
  join {schema}.runtime_attempts as a on a.attempt_id = l.attempt_id
 where l.lease_id = $4
   and a.lease_id = l.lease_id;

-- name: give_back @postgres
-- Undo a claim whose caller was cancelled: the attempts are ready again and the try does not count. Returns their queues.
with mine as (
    select attempt_id
      from {schema}.runtime_attempts
     where attempt_id in (
               select attempt_id from {schema}.runtime_leases
                where lease_id in (
                          select value
                            from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json)))
     order by attempt_id
       for update
), ended as (
    delete from {schema}.runtime_leases
     where lease_id in (select value from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json))
       and attempt_id in (select attempt_id from mine)
    returning attempt_id, version, lease_id
)
update {schema}.runtime_attempts as a
   set status = 'queued', retry_at_ms = null, ended_by = 'give_back'
  from ended
 where a.attempt_id    = ended.attempt_id
   and a.lease_version = ended.version
   and a.lease_id      = ended.lease_id
   and a.status in ('leased', 'running')
returning a.queue;

-- name: give_back @sqlite
-- As above, in two statements of one transaction.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = null, ended_by = 'give_back'
 where status in ('leased', 'running')
   and (attempt_id, lease_version, lease_id) in (
           select attempt_id, version, lease_id from {schema}.runtime_leases
            where lease_id in (select value from json_each($1)))
returning queue;
delete from {schema}.runtime_leases
 where lease_id in (select value from json_each($1));

-- name: heartbeat
-- Keep a lease, while it is still this token's and has not run out. Fenced on the lease's own row, and it looks at the
-- attempt as well: a cancel that waited for a claim to commit did not see its lease, which is there still and owns
-- nothing.
update {schema}.runtime_leases
   set heartbeat_at_ms     = coalesce($4, {now_ms}),
       lease_expires_at_ms = coalesce($4, {now_ms}) + $3
 where lease_id = $1
   and version  = $2
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
-- writes several leases.
with given as (
    select lease_id, attempt_id, token
      from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json) as x (
               lease_id pg_catalog.text, attempt_id pg_catalog.text, token bigint)
), locked as (
    select given.lease_id, given.token
      from {schema}.runtime_attempts as a
      join given on given.attempt_id = a.attempt_id and given.token = a.lease_version and given.lease_id = a.lease_id
     where a.attempt_id = any (array(select attempt_id from given))
       and a.status in ('leased', 'running')
     order by a.attempt_id
       for update of a
)
update {schema}.runtime_leases as l
   set heartbeat_at_ms     = coalesce($3, {now_ms}),
       lease_expires_at_ms = coalesce($3, {now_ms}) + $2::bigint
  from locked
 where l.lease_id = locked.lease_id
   and l.version  = locked.token
   and l.lease_expires_at_ms > coalesce($3, {now_ms})
returning l.lease_id, l.heartbeat_at_ms, l.lease_expires_at_ms;

-- name: heartbeat_many @sqlite
-- As above: here nobody else is writing.
update {schema}.runtime_leases
   set heartbeat_at_ms     = coalesce($3, {now_ms}),
       lease_expires_at_ms = coalesce($3, {now_ms}) + $2
 where (lease_id, version) in (
           select a.lease_id, a.lease_version
             from json_each($1) as given
             join {schema}.runtime_attempts as a
               on a.attempt_id    = json_extract(given.value, '$.attempt_id')
              and a.lease_version = json_extract(given.value, '$.token')
              and a.lease_id      = json_extract(given.value, '$.lease_id')
            where +a.status in ('leased', 'running'))
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
     where attempt_id in (select attempt_id from released)
)
select {attempt}
  from released;

-- name: release @sqlite
-- As above, in two statements of one transaction.
update {schema}.runtime_attempts
   set status = 'queued', retry_at_ms = coalesce($4, {now_ms}) + $3, ended_by = 'release'
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
              and ended_by   = 'release');

-- name: list
-- One page of all leases, in the order of their ids, after the last id of the page before.
select {lease}
  from {schema}.runtime_leases as l
  join {schema}.runtime_attempts as a on a.attempt_id = l.attempt_id
 where l.lease_id > $1
 order by l.lease_id
 limit $2;

-- name: list_by_worker
-- As above, of one worker.
select {lease}
  from {schema}.runtime_leases as l
  join {schema}.runtime_attempts as a on a.attempt_id = l.attempt_id
 where l.worker_id = $1
   and l.lease_id > $2
 order by l.lease_id
 limit $3;

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
  from {schema}.runtime_attempts as a
  join {schema}.runtime_leases as l
    on l.attempt_id = a.attempt_id and l.lease_id = a.lease_id and l.version = a.lease_version
 where a.attempt_id = any (array(
           select value from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json)))
   and a.status in ('leased', 'running')
   and l.lease_expires_at_ms > coalesce($2, {now_ms});

-- name: held_many @sqlite
select a.attempt_id, a.lease_version, a.lease_id
  from {schema}.runtime_attempts as a
  join {schema}.runtime_leases as l
    on l.attempt_id = a.attempt_id and l.lease_id = a.lease_id and l.version = a.lease_version
 where a.attempt_id in (select value from json_each($1))
   and +a.status in ('leased', 'running')
   and l.lease_expires_at_ms > coalesce($2, {now_ms});

-- name: park @postgres
-- Take out of the way what was just claimed under a lease ($1) and cannot be read, and say why ($2): as a failed one an
-- operator finds it. Fenced by the lease's id, for what it holds may be anything.
with parked as (
    update {schema}.runtime_attempts
       set status = 'failed', retry_at_ms = null, error = $2, finished_at_ms = coalesce($3, {now_ms}), ended_by = 'park'
     where attempt_id = any (array(select attempt_id from {schema}.runtime_leases where lease_id = $1))
       and lease_id = $1
       and status in ('leased', 'running')
    returning attempt_id
)
delete from {schema}.runtime_leases
 where lease_id = $1
   and attempt_id in (select attempt_id from parked);

-- name: park @sqlite
-- As above, in two statements of one transaction.
update {schema}.runtime_attempts
   set status = 'failed', retry_at_ms = null, error = $2, finished_at_ms = coalesce($3, {now_ms}), ended_by = 'park'
 where attempt_id in (select attempt_id from {schema}.runtime_leases where lease_id = $1)
   and lease_id = $1
   and +status in ('leased', 'running');
delete from {schema}.runtime_leases
 where lease_id = $1;

-- name: requeue_expired @postgres
-- Take attempts from workers that fell silent. The attempt is locked first, skipping those that are being written, then
-- the lease is deleted only if it still is expired (a heartbeat may have come in between), and only what was deleted
-- is requeued. The lost try counts, so an attempt that kills its workers ends as failed.
-- A lease that lasts for more than a thousand years is another program's mistake, and so is an attempt that is held under
-- no lease: it is taken if it still has the token and the id under which it was seen to have none, for whoever claims it
-- meanwhile gives it others.
-- A lease whose attempt is gone, or is nobody's to hold, is deleted with them: as many as are looked at, skipping what
-- a claim is writing anew. None keeps the sweep from those behind it.
-- With an attempt's id ($4) it is done for this one alone.
with late as (
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
    select attempt_id
      from {schema}.runtime_attempts
     where attempt_id = any (array(select attempt_id from late limit $1))
     order by attempt_id
       for update skip locked
), ended as (
    delete from {schema}.runtime_leases as l
     using expired
     where l.attempt_id = expired.attempt_id
       and (l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3::bigint
            or l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long})
    returning l.attempt_id, l.worker_id
), stranded as (
    select held.attempt_id, held.lease_version, held.lease_id
      from {schema}.runtime_attempts as held
     where held.status in ('leased', 'running')
       and ($4::pg_catalog.text is null or held.attempt_id = $4)
       and not exists (select 1 from {schema}.runtime_leases as l where l.attempt_id = held.attempt_id)
     limit $1
), taken as (
    select a.attempt_id, a.worker_id
      from {schema}.runtime_attempts as a
      join stranded on stranded.attempt_id = a.attempt_id and stranded.lease_version = a.lease_version
     where a.attempt_id = any (array(select attempt_id from stranded))
       and a.lease_id is not distinct from stranded.lease_id
       and a.status in ('leased', 'running')
     order by a.attempt_id
     limit $1 - (select pg_catalog.count(*) from ended)
       for update of a skip locked
), orphans as (
    delete from {schema}.runtime_leases
     where lease_id = any (array(
               select l.lease_id
                 from {schema}.runtime_leases as l
                where l.lease_id = any (array(
                          (select lease_id
                             from {schema}.runtime_leases
                            where lease_expires_at_ms <= coalesce($2, {now_ms}) - $3::bigint
                            order by lease_expires_at_ms
                            limit $1)
                           union all
                          (select lease_id
                             from {schema}.runtime_leases
                            where lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long}
                            order by lease_expires_at_ms
                            limit $1)))
                  and (l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3::bigint
                       or l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long})
                  and $4::pg_catalog.text is null
                  and not exists (
                          select 1
                            from {schema}.runtime_attempts as a
                           where a.attempt_id = l.attempt_id
                             and a.status in ('leased', 'running'))
                  for update of l skip locked))
)
update {schema}.runtime_attempts as a
   set status         = case when attempt_no >= max_attempts then 'failed' else 'queued' end,
       attempt_no     = case when attempt_no >= max_attempts then attempt_no else attempt_no + 1 end,
       retry_at_ms    = null,
       finished_at_ms = case when attempt_no >= max_attempts then coalesce($2, {now_ms}) end,
       error          = 'the lease of worker ' || coalesce(silent.worker_id, 'unknown') || silent.fate,
       ended_by       = 'expire'
  from (select attempt_id, worker_id, ' expired' as fate from ended
         union all
        select attempt_id, worker_id, ' is gone' as fate from taken) as silent
 where a.attempt_id = silent.attempt_id
   and a.status in ('leased', 'running')
returning {attempt_of_a};

-- name: requeue_expired @sqlite
-- As above, in statements of one transaction. The clock moves between them, so each deletes only the leases of what is
-- not held. By their rowid: a key may be NULL. A time that is text or bytes is beyond all numbers.
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
 where +status in ('leased', 'running')
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
                    where a.status in ('leased', 'running')
                      and ($4 is null or a.attempt_id = $4)
                      and not exists (select 1 from {schema}.runtime_leases as l where l.attempt_id = a.attempt_id))
                       as silent
            limit $1)
returning {attempt};
delete from {schema}.runtime_leases
 where rowid in (
           select l.rowid
             from {schema}.runtime_leases as l
            where (l.lease_expires_at_ms <= coalesce($2, {now_ms}) - $3
                   or l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long})
              and (select a.status in ('queued', 'failed') and a.ended_by = 'expire' and a.lease_id = l.lease_id
                     from {schema}.runtime_attempts as a
                    where a.attempt_id = l.attempt_id)
            limit $1);
delete from {schema}.runtime_leases
 where rowid in (
           select rowid
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
            or l.lease_expires_at_ms > coalesce($2, {now_ms}) + {too_long}
         order by l.lease_expires_at_ms
         limit $1) as expired
 union all
select attempt_id
  from (select a.attempt_id
          from {schema}.runtime_attempts as a
         where a.status in ('leased', 'running')
           and not exists (select 1 from {schema}.runtime_leases as l where l.attempt_id = a.attempt_id)
         limit $1) as stranded;
