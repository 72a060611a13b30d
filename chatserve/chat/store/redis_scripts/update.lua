-- owner, now, then field and value pairs; system and value, or 'no system'. Answers: ok, meta
if not owned(ARGV[1]) then return pack(answer('gone')) end
local first, firsts = {}, {}
local i = 3
while i <= #ARGV do
  if ARGV[i] == 'leaf' and redis.call('HEXISTS', PARENTS, ARGV[i + 1]) == 0 then
    return pack(answer('leaf'))
  end
  if ARGV[i] == 'system' or ARGV[i] == 'no system' then
    local system = ARGV[i] == 'system' and ARGV[i + 1] or false
    if redis.call('HGET', META, 'system') ~= system then firsts = redis.call('HGETALL', PARENTS) end
    first.system, first.changed = system, true
  end
  i = i + 2
end
redis.call('HLEN', IDS)
local old = redis.call('HGET', META, 'system')
local revision = change(ARGV[2])
for i = 3, #ARGV, 2 do
  if ARGV[i] == 'no system' then
    redis.call('HDEL', META, 'system')
  else
    redis.call('HSET', META, ARGV[i], ARGV[i + 1])
  end
end
if first.changed and first.system ~= old then
  -- First messages' ids hold the old system prompt.
  redis.call('HSET', META, 'since', revision)
  for i = 1, #firsts, 2 do
    if string.match(firsts[i + 1], '^%a%d+ $') then redis.call('HDEL', IDS, firsts[i]) end
  end
end
local row = answer('ok')
add_meta(row)
return pack(row)
