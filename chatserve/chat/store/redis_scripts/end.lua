-- reply, epoch, ending's value, now, title, prompt's value of IDS, '=' and page names in a
-- row, or '', 'turn' or '', turn's value, ids.
-- Answers: ok, meta | gone | superseded
local reply, epoch, ending, now, title, prompt, names, has_turn, value, ids = unpack(ARGV)
local running = redis.call('HGET', RUNNING, reply)
local ended = not running and redis.call('HGET', ENDED, reply)
if not running and not ended then return pack(answer('gone')) end
-- What has ended begins with what it was under RUNNING, packed.
local last = string.match(running or ended, running and '^(%d+) ' or '^%d+:(%d+) ')
if tonumber(last) > tonumber(epoch) then return pack(answer('superseded')) end
if ended then
  local row = answer('ok')
  add_meta(row)
  return pack(row)
end
local revision, turn = string.match(running, '^%d+ (%d+) %S+ (.*)$')
local above = redis.call('HGET', PARENTS, turn)
local meta = redis.call('HMGET', META, 'leaf', 'title', 'since', 'updated')
if not above or not meta[4] then return pack(answer('gone')) end
redis.call('HLEN', TURNS); redis.call('HLEN', IDS); redis.call('HLEN', ENDED)
redis.call('HLEN', NAMES)

redis.call('HDEL', RUNNING, reply)
if names ~= '' then redis.call('HSET', NAMES, reply, string.sub(names, 2)) end
redis.call('HSET', ENDED, reply, pack(answer(running)) .. ending)
-- A first message's ids hold the system prompt: of a former one they are worth nothing.
local first = string.match(above, '^%a%d+ $')
if prompt ~= '' and not (first and tonumber(meta[3] or '0') > tonumber(revision)) then
  redis.call('HSET', IDS, turn, prompt)
end
if has_turn ~= '' then
  keep_turn(reply, 'a', turn, value, ids)
  if meta[1] == turn then redis.call('HSET', META, 'leaf', reply) end
end
if meta[2] == '' and title ~= '' then redis.call('HSET', META, 'title', title) end
redis.call('UNLINK', LOG .. reply)
change(now)
local row = answer('ok')
add_meta(row)
return pack(row)
