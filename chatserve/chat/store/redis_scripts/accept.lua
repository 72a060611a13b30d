-- owner, ask, digest, reply, reply's value, now, turns at most, 'content' or '', turn's value,
-- 'leaf' (the current one) or 'parent', parent, id of our lease.
-- Answers: known, meta, reply, record | accepted, meta, reply, record, path | gone | parent
--          | elsewhere | a conflict's short name
local owner, ask, digest, reply, kept, now, most, content, value, where, parent, id = unpack(ARGV)
if not owned(owner) then return pack(answer('gone')) end
local known = redis.call('HGET', ASKS, ask)
if known then
  local old_digest, old_reply = string.match(known, '^(%x*) (.*)$')
  if old_digest ~= digest then return pack(answer('digest')) end
  local at = redis.call('HGET', RUNNING, old_reply)
  local again = at and old_reply == reply  -- this very call, sent twice
  local row = answer(again and 'accepted' or 'known')
  add_meta(row)
  add(row, old_reply)
  add_record(row, old_reply)
  if again then add_turns(row, path(answered(at))) end
  return pack(row)
end
if elsewhere(id) then return pack(answer('elsewhere')) end
if redis.call('SISMEMBER', REFUSED, reply) == 1 then return pack(answer('refused')) end

if where == 'leaf' then parent = redis.call('HGET', META, 'leaf') or '' end
local running = redis.call('HGETALL', RUNNING)
redis.call('HLEN', ENDED); redis.call('HLEN', TURNS); redis.call('HLEN', IDS)
local function refusal()
  if redis.call('HLEN', PARENTS) + 2 > tonumber(most) then return 'full' end
  if parent == '' then
    if content == '' then return 'nothing' end
  else
    for i = 1, #running, 2 do
      if running[i] == parent then return 'running' end
    end
    local above = redis.call('HGET', PARENTS, parent)
    if not above then return 'parent' end
    for i = 1, #running, 2 do
      if answered(running[i + 1]) == parent then return 'running' end
    end
    local role = string.sub(above, 1, 1)
    if content ~= '' and role == 'u' then return 'user' end
    if content == '' and role == 'a' then return 'assistant' end
  end
  if content ~= '' and (redis.call('HEXISTS', PARENTS, ask) == 1
      or redis.call('HEXISTS', REPLIES, ask) == 1) then
    return 'taken'
  end
end
local refused = refusal()
if refused then return pack(answer(refused)) end
redis.call('HLEN', REPLIES); redis.call('XLEN', LOG .. reply)

local turn = parent
if content ~= '' then
  turn = ask
  keep_turn(turn, 'u', parent, value, '')
end
redis.call('HSET', META, 'leaf', turn)
local revision = change(now)
redis.call('HSET', ASKS, ask, digest .. ' ' .. reply)
redis.call('HSET', REPLIES, reply, kept)
redis.call('HSET', RUNNING, reply, '1 ' .. revision .. ' - ' .. turn)
-- Appends go only to a log that exists. Its head keeps what the reply is answered with: whoever
-- takes it up goes on with that, whatever has become of the conversation's.
local settings, system = unpack(redis.call('HMGET', META, 'settings', 'system'), 1, 2)
local head = {'head', '', 'settings', settings or ''}
if system then head[5], head[6] = 'system', system end
redis.call('XADD', LOG .. reply, '1-0', unpack(head))
local row = answer('accepted')
add_meta(row)
add(row, reply)
add_record(row, reply)
add_turns(row, path(turn))
return pack(row)
