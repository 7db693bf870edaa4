"""What a registration cache costs on this machine, beside its peers; `usermm bench` shows it. Nothing here prints."""
