-- reply, id of our lease. Answers: ok, meta, record, path | gone | ended | elsewhere
local reply = ARGV[1]
local running = redis.call('HGET', RUNNING, reply)
if not running then
  return pack(answer(redis.call('HEXISTS', ENDED, reply) == 1 and 'ended' or 'gone'))
end
if elsewhere(ARGV[2]) then return pack(answer('elsewhere')) end
local epoch, revision, logged, turn = string.match(running, '^(%d+) (%d+) (%S+) (.*)$')
local last = redis.call('XREVRANGE', LOG .. reply, '+', '-', 'COUNT', 1)[1]
local seq = last and string.match(last[1], '%-(%d+)$') or '0'
-- An epoch's head, so nothing was said in it; or the log was lost.
if seq == '0' then seq = string.match(logged, '(%d+)$') or '0' end
local with = {}  -- settings and system prompt, as it was accepted with them
local head = redis.call('XRANGE', LOG .. reply, '1-0', '1-0')[1] or {'', {}}
for i = 1, #head[2], 2 do with[head[2][i]] = head[2][i + 1] end
local since = redis.call('HGET', META, 'since') or '0'
local turns, parents = path(turn)
if not parents[#parents] or redis.call('EXISTS', META) == 0 then return pack(answer('gone')) end

local ends = logged == '-' and seq or (logged .. ',' .. seq)
redis.call('HSET', RUNNING, reply, (epoch + 1) .. ' ' .. revision .. ' ' .. ends .. ' ' .. turn)
-- From here on the log takes nothing of a former epoch.
redis.call('XADD', LOG .. reply, (epoch + 1) .. '-0', 'head', '')
local row = answer('ok')
add_meta(row)
if with.settings then
  for i, name in ipairs(META_FIELDS) do
    if name == 'settings' or name == 'system' then row[1 + i] = with[name] or false end
  end
end
add_record(row, reply)
add_turns(row, turns, parents)
-- The first message is the last of them, and its ids hold a later system prompt.
if with.settings and tonumber(since) > tonumber(revision) then row[row.n] = false end
return pack(row)
