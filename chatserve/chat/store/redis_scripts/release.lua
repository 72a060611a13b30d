-- The lease alone is its key. Id.
local found = redis.call('GET', KEYS[1])
if found and string.match(found, '^%S*') == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
