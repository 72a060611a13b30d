-- owner. Answers: ok, meta | gone
if not owned(ARGV[1]) then return pack(answer('gone')) end
local row = answer('ok')
add_meta(row)
return pack(row)
