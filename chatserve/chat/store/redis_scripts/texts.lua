-- Answers: ok, then the values of all turns
local row = answer('ok')
for _, value in ipairs(redis.call('HVALS', TURNS)) do add(row, value) end
return pack(row)
