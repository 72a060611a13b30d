-- The lease alone is its key. Id, value, milliseconds, another's value that does not count, or ''.
-- Answers: 1 if it is ours now, else 0; the value that was there
local id, value, milliseconds, dead = unpack(ARGV)
local found = redis.call('GET', KEYS[1])
if found and string.match(found, '^%S*') ~= id and found ~= dead then return {0, found} end
redis.call('SET', KEYS[1], value, 'PX', milliseconds)
return {1, found}
