import { mount } from "svelte";
import "./app.css";
import Admin from "./Admin.svelte";

const target = document.getElementById("app");
if (target === null) throw new Error("admin.html has no place for the page");
mount(Admin, { target });
